"""ThreeTowers: the main pair, the heads, the scale, and the objective over their views.

Legend: B samples, D embedding width, P a frozen tower's width.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from threetowers.config import ObjectiveConfig, RunConfig
from threetowers.data.transforms import ImageSpec, normalise
from threetowers.errors import UsageError
from threetowers.objective import losses, sharded
from threetowers.objective.kinds import LOSSES, Compared
from threetowers.objective.pairs import Kind, Objective, objective, start_view, tower_of
from threetowers.processes import ALONE, Processes
from threetowers.towers.frozen.base import FrozenTower
from threetowers.towers.frozen.image_tower import as_image_tower
from threetowers.towers.heads import head
from threetowers.towers.pair import (
    build_image_tower,
    build_text_tower,
    encode_text,
    image_spec,
    load_pair_weights,
    model_config,
)
from threetowers.towers.start import TextStart, is_half_of_pair, one_activation


@dataclass(frozen=True)
class Architecture:
    """What rebuilds the main pair: open_clip's model_cfg and the image tower's preprocessing."""

    model_cfg: dict[str, Any]
    image: ImageSpec


class ThreeTowers(nn.Module):
    """The trainable part of every method: towers `img` and `txt`, `heads` by view name, `log_scale`, `bias`.

    The frozen towers are not part of it. It receives their features and multiplies them by `third_norms`, stored
    constants that bring the mean squared norm of each tower's features to its width P. text_thirds: those frozen towers
    that read captions.
    """

    third_norms: Tensor

    def __init__(
        self,
        table: Objective,
        img: nn.Module | None,
        txt: nn.Module,
        embed_dim: int,
        third_widths: Mapping[str, int],
        options: ObjectiveConfig,
        image: ImageSpec,
        seed: int,
        text_thirds: Collection[str] = (),
    ) -> None:
        super().__init__()
        self.started: dict[str, float] = {}
        """The modules that start at given weights, and the multiple of the learning rate that these have."""
        self.keep_statistics = False
        """Whether BatchNorm of the image tower uses its running statistics in training, and leaves them as they are."""
        self.objective, self.image, self.embed_dim = table, image, embed_dim
        self.img, self.txt = img, txt
        self.thirds, self.third_widths = tuple(third_widths), dict(third_widths)
        self.text_thirds = tuple(text_thirds)
        self.register_buffer("third_norms", torch.ones(len(self.thirds)))
        widths = {"img": embed_dim, "txt": embed_dim, **third_widths}
        self.heads = nn.ModuleDict()
        for row in table.rows:
            for view, other in ((row.a, row.b), (row.b, row.a)):
                if "@" in view:
                    # facing a view without a head of its own means predicting that tower's features
                    out_dim = embed_dim if "@" in other else widths[tower_of(other)]
                    self.heads[view] = head(widths[tower_of(view)], out_dim, seed=seed, name=view)
        if table.image == "third" and options.lit_projection:
            self.heads["img"] = head(third_widths[self.thirds[0]], embed_dim, seed=seed, name="img")
        num_scales = 1 if options.scale == "shared" else len(table.rows)
        self.log_scale = nn.Parameter(torch.full((num_scales,), math.log(options.init_scale)))
        self.max_log_scale = math.log(options.max_scale)
        biased = any(LOSSES[row.kind].bias for row in table.rows)
        self.bias = nn.Parameter(torch.full((len(table.rows),), options.init_bias)) if biased else None

    def train(self, mode: bool = True) -> "ThreeTowers":
        """Sets the mode of every module, and keeps BatchNorm of a started image tower in that of evaluation."""
        super().train(mode)
        if self.keep_statistics and self.img is not None:
            for module in self.img.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def features(
        self,
        *,
        pixels: Tensor | None = None,
        tokens: Tensor | None = None,
        thirds: Mapping[str, Tensor] | None = None,
        autocast: AbstractContextManager[Any] | None = None,
    ) -> dict[str, Tensor]:
        """Features by tower name, of whichever inputs are given: fp32 of the main towers, the others as they are given.

        pixels: uint8 [B, 3, H, W]. tokens: int64 [B, n]. thirds: frozen features [B, P] by view name, as the tower
        gave them. autocast: a context for the main towers' precision.
        """
        feats: dict[str, Tensor] = {}
        with autocast or nullcontext():
            if pixels is not None and self.img is not None:
                feats["img"] = self.img(normalise(pixels, self.image)).float()
            if tokens is not None:
                feats["txt"] = encode_text(self.txt, tokens).float()
        return feats | {view: values for view, values in (thirds or {}).items() if view in self.thirds}

    def raw_view(self, name: str, feats: Mapping[str, Tensor]) -> Tensor:
        """The view before normalisation: a tower's features fp32, or what its head makes of them."""
        source = self.source(name)
        values = feats[source]
        if source in self.thirds:
            values = values.float() * self.third_norms[self.thirds.index(source)]
        return self.heads[name](values) if name in self.heads else values

    def source(self, view: str) -> str:
        """The tower whose features a view is made of: of LiT's image tower, the third tower."""
        return self.thirds[0] if view == "img" and self.objective.image == "third" else tower_of(view)

    def view(self, name: str, feats: Mapping[str, Tensor]) -> Tensor:
        """The unit vectors [B, D] of a view."""
        return losses.unit(self.raw_view(name, feats))

    def scale(self, row: int = 0) -> Tensor:
        """The factor of the cosines of a row, exp(log_scale)."""
        return self.log_scale[row if len(self.log_scale) > 1 else 0].exp()

    @torch.no_grad()
    def clamp_scale(self) -> None:
        """Keeps every scale at most its maximum; called after each optimiser step."""
        self.log_scale.clamp_(max=self.max_log_scale)

    def compared(
        self, index: int, feats: Mapping[str, Tensor], ids: tuple[Tensor, ...] = (), *, bf16: bool = False
    ) -> Compared:
        """What the loss of one row of the table is computed from; see `loss`."""
        row = self.objective.rows[index]
        view = self.view if LOSSES[row.kind].unit else self.raw_view
        return self._compared(index, view(row.a, feats), view(row.b, feats), ids, bf16)

    def _compared(self, index: int, a: Tensor, b: Tensor, ids: tuple[Tensor, ...], bf16: bool) -> Compared:
        bias = None if self.bias is None else self.bias[index]
        return Compared(a, b, self.scale(index), bias, ids, bf16)

    def row_loss(
        self, index: int, feats: Mapping[str, Tensor], ids: tuple[Tensor, ...] = (), *, bf16: bool = False
    ) -> Tensor:
        """The loss of one row of the table, not weighted; see `loss`."""
        return LOSSES[self.objective.rows[index].kind].loss(self.compared(index, feats, ids, bf16=bf16))

    def loss(
        self,
        feats: Mapping[str, Tensor],
        ids: tuple[Tensor, ...] = (),
        *,
        bf16: bool = False,
        weights: Sequence[float] | None = None,
        processes: Processes = ALONE,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum over the rows, and each row's own loss by the row's name.

        ids: int64 [B] each; samples that share one are not each other's negatives. bf16: on CUDA, multiply in bf16
        and add in fp32; positive pairs are fp32 all the same. weights: one for each row; None takes those of the first
        step. A row of weight 0 is computed for the log, and what it gives to the gradient is 0. processes: those that
        share the batch, each with its own feats and ids; see `sharded.loss` for whose gradients are made.
        """
        weights = self.objective.weights(0) if weights is None else weights
        if processes.size > 1:
            compared, views = self._to_share(feats, ids, bf16=bf16)
            whole, values = sharded.loss(compared, weights, processes, views)
            return whole, {row.name: value for row, value in zip(self.objective.rows, values, strict=True)}
        rows = {
            row.name: self.row_loss(i, feats, ids, bf16=bf16) for i, row in enumerate(self.objective.rows)
        }
        total = sum(weight * rows[row.name] for row, weight in zip(self.objective.rows, weights, strict=True))
        assert isinstance(total, Tensor)
        return total, rows

    def _to_share(
        self, feats: Mapping[str, Tensor], ids: tuple[Tensor, ...], *, bf16: bool
    ) -> tuple[list[tuple[Kind, Compared]], dict[int, sharded.View]]:
        """The rows as `sharded.loss` takes them: a view of a third tower as its features, and what makes it of them."""
        rows: list[tuple[Kind, Compared]] = []
        views: dict[int, sharded.View] = {}
        for i, row in enumerate(self.objective.rows):
            # both directions of these kinds count alike, so either side can be the frozen one
            main, frozen = (row.b, row.a) if self.source(row.a) in self.thirds else (row.a, row.b)
            source = self.source(frozen)
            if row.kind in sharded.SHARES and source in self.thirds:
                views[i] = partial(self._view_of, frozen)
                compared = self._compared(i, self.view(main, feats), feats[source], ids, bf16)
            else:
                compared = self.compared(i, feats, ids, bf16=bf16)
            rows.append((row.kind, compared))
        return rows, views

    def _view_of(self, name: str, features: Tensor) -> Tensor:
        """A view of the features of its tower."""
        return self.view(name, {self.source(name): features})

    @torch.no_grad()
    def accuracies(
        self, feats: Mapping[str, Tensor], image_ids: Tensor, caption_ids: Tensor, own: slice = slice(None)
    ) -> dict[str, Tensor]:
        """Share of samples whose nearest partner in the batch is right, for each contrastive row.

        image_ids, caption_ids: int64 [B], equal for equal images and captions, each of whose partners is right. own:
        the samples whose partners are looked for, among those of all.
        """

        def ids(view: str) -> Tensor:
            return caption_ids if tower_of(view) in ("txt", *self.text_thirds) else image_ids

        return {
            row.name: losses.contrastive_accuracy(
                self.view(row.a, feats), self.view(row.b, feats), (ids(row.a), ids(row.b)), own
            )
            for row in self.objective.rows
            if LOSSES[row.kind].contrastive
        }

    @torch.no_grad()
    def set_third_norm(self, view: str, mean_square_norm: float) -> None:
        """Stores the constant that brings the frozen features' mean squared norm to their width."""
        self.third_norms[self.thirds.index(view)] = math.sqrt(
            self.third_widths[view] / max(mean_square_norm, 1e-12)
        )

    def needs_pixels(self) -> bool:
        return self.img is not None

    def num_trainable(self) -> int:
        return sum(p.numel() for p in self.parameters() if p.requires_grad)


def build(
    config: RunConfig,
    thirds: Mapping[str, FrozenTower],
    text_cfg: Mapping[str, Any],
    image_start: FrozenTower | None = None,
    text_start: TextStart | None = None,
) -> tuple[ThreeTowers, Architecture]:
    """The model of a configuration, freshly initialised, and the architecture of its pair.

    thirds: the loaded frozen towers by view name. text_cfg: what the tokenizer decides of open_clip's text_cfg.
    image_start, text_start: what `start.image` and `start.text` name, where that is no third tower of the run. The
    width of the shared space is that of a tower that starts as half of a pair; others get a projection to it. Without
    `lit_projection` a sentence encoder that has this width already gets none.
    Raises UsageError for a table or a pair that cannot be built.
    """
    table = objective(config)
    model_cfg = model_config(config.pair)
    source = _image_source(table, config, thirds, image_start)
    if one_activation(config.pair, model_cfg, source, text_start):
        model_cfg["quick_gelu"] = True
    else:
        model_cfg.pop("quick_gelu", None)
    pair_width = text_start.width if text_start is not None and text_start.in_pair else None
    if pair_width is not None:
        model_cfg["embed_dim"] = pair_width
    model_cfg["text_cfg"] = {**model_cfg["text_cfg"], **text_cfg}
    img: nn.Module | None
    if source is None:
        projects, image = False, image_spec(model_cfg, config.pair)
        img = build_image_tower(model_cfg, config.seed)
    else:
        if source is image_start and is_half_of_pair(source.spec):
            projects = pair_width not in (None, source.width)
        else:
            projects = config.objective.lit_projection
        size = config.start.image_size if table.image == "start" else None
        img, image = _image_tower_of(source, config, model_cfg, projects, size), source.image.at(size)
        if table.image == "third":
            img = None  # it joins the pair when training is done
    txt = _text_tower(config, model_cfg, text_cfg, text_start)
    if config.pair.weights is not None:
        _load_weights_of_pair(table, config, img, txt, text_start)
    widths = _third_widths(table, thirds, model_cfg["embed_dim"])
    model = ThreeTowers(
        table, img, txt, model_cfg["embed_dim"], widths, config.objective, image, config.seed,
        text_thirds=[view for view in widths if thirds[view].reads == "texts"],
    )  # fmt: skip
    model.started = _started(table, config, img, projects, text_start)
    model.keep_statistics = table.image == "start" and config.start.batchnorm == "frozen"
    return model, Architecture(model_cfg, image)


def _image_source(
    table: Objective, config: RunConfig, thirds: Mapping[str, FrozenTower], image_start: FrozenTower | None
) -> FrozenTower | None:
    """The frozen tower that the image tower is, or starts at; None for one that `pair` describes."""
    if table.image == "third":
        (third,) = thirds.values()
        return third
    if table.image == "start":
        return image_start or thirds[start_view(config)]
    return None


def _image_tower_of(
    third: FrozenTower, config: RunConfig, model_cfg: dict[str, Any], projects: bool, size: int | None = None
) -> nn.Module:
    """The frozen tower's network as image tower; writes its vision_cfg, and its width, into model_cfg.

    projects: whether a new projection to the pair's width follows. size: of its input, None for its own.
    """
    if third.reads == "texts":
        raise UsageError(
            f"method {config.method!r} takes its image tower from the third tower, and {third.spec!r} reads texts; "
            "give it an image tower, or use it with method 3t"
        )
    projection = None
    if projects:
        layer = head(third.width, model_cfg["embed_dim"], seed=config.seed, name="img")
        projection = layer.weight.detach()
    else:
        model_cfg["embed_dim"] = third.width
    img, model_cfg["vision_cfg"] = as_image_tower(third, projection, size)
    return img


def _text_tower(
    config: RunConfig, model_cfg: dict[str, Any], text_cfg: Mapping[str, Any], start: TextStart | None
) -> nn.Module:
    """The text tower, with the weights that it starts at; writes its text_cfg into model_cfg."""
    if start is None:
        return build_text_tower(model_cfg, config.seed)
    start = start.projected(model_cfg["embed_dim"], config.seed, always=config.objective.lit_projection)
    if model_cfg["embed_dim"] != start.width:
        raise UsageError(
            f"objective.lit_projection: without it the pair is {model_cfg['embed_dim']} wide, and the text tower "
            f"of {start.spec!r} {start.width}"
        )
    model_cfg["text_cfg"] = {**text_cfg, **start.config}
    txt = build_text_tower(model_cfg, config.seed)
    start.load_into(txt)
    return txt


def _load_weights_of_pair(
    table: Objective, config: RunConfig, img: nn.Module | None, txt: nn.Module, text_start: TextStart | None
) -> None:
    """Gives both towers the weights of `pair.weights`."""
    if table.image != "own" or text_start is not None:
        whose = "start.text" if table.image == "own" else f"method {config.method!r} or start.image"
        raise UsageError(f"pair.weights: these are weights of both towers, and {whose} names others for one")
    assert img is not None and config.pair.weights is not None
    load_pair_weights(img, txt, config.pair.weights)


def _third_widths(table: Objective, thirds: Mapping[str, FrozenTower], embed_dim: int) -> dict[str, int]:
    """The widths of the third towers that the model reads; raises UsageError for a row that compares two widths."""
    used = {tower_of(view) for view in table.views()}
    widths = {view: t.width for view, t in thirds.items() if view in used or table.image == "third"}
    for row in table.rows:
        if row.a in ("img", "txt") and widths.get(row.b, embed_dim) != embed_dim:
            raise UsageError(
                f"objective.heads: none compares {row.a}, {embed_dim} wide, with {row.b}, {widths[row.b]} wide; give "
                "another pair.embed_dim, or heads"
            )
    return widths


def _started(
    table: Objective, config: RunConfig, img: nn.Module | None, projects: bool, text_start: TextStart | None
) -> dict[str, float]:
    """The parts that start at given weights, with their multiple of the learning rate; new projections are none."""
    if config.pair.weights is not None:
        return {"img": 1.0, "txt": 1.0}
    started = {}
    if table.image == "start":
        started["img.trunk" if projects and hasattr(img, "trunk") else "img"] = config.start.lr
    if text_start is not None:
        started["txt" if text_start.in_pair else "txt.transformer"] = config.start.lr
    return started
