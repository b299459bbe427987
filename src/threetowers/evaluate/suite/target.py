"""What a suite evaluates: a two-tower model of any library, as two towers in eval mode.

    target = open_target("runs/mine")                  # a run of ours; its frozen towers come along
    target = open_target("open_clip:ViT-B-32@openai")  # or a directory that open_clip loads
    target = open_target("hf:openai/clip-vit-base-patch32")

Each tower keeps its own preprocessing or tokenizer, exactly as its library applies it.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from threetowers.data.tokenize import Tokenizer
from threetowers.errors import CheckpointError, ThreeTowersError, UsageError
from threetowers.progress import warn
from threetowers.run.finished import FinishedRun, load_run
from threetowers.settings import read_config
from threetowers.towers.frozen.base import FrozenTower, Loaded, digest_of
from threetowers.towers.frozen.hf import (
    PROCESSORS,
    image_spec,
    load_model,
    local_folder,
    num_channels,
    processor_settings,
)
from threetowers.towers.frozen.load import load_frozen
from threetowers.towers.frozen.open_clip import image_side, load_pair
from threetowers.towers.frozen.text import (
    HuggingFaceTokens,
    load_hf_tokenizer,
    pad_id,
    text_side,
    token_limit,
)
from threetowers.towers.pair import encode_text


@dataclass(frozen=True, eq=False)
class Target:
    """A model under evaluation. Image and text features are compared by their cosine.

    name: as the user wrote it. scale: what cosines are multiplied by to be logits. thirds: of a run, the frozen towers
    of images that it learned from, by view name.
    """

    name: str
    image: FrozenTower
    text: FrozenTower
    scale: float
    thirds: Mapping[str, FrozenTower] = field(default_factory=dict)

    def digest(self) -> str:
        """Sixteen hex digits of the weights, the preprocessing and the tokenizer of all towers."""
        return digest_of({view: digest_of(parts) for view, parts in self.fingerprints.items()})

    @cached_property
    def fingerprints(self) -> dict[str, dict[str, str]]:
        """The fingerprints of every tower by its view."""
        towers = (self.image, self.text, *self.thirds.values())
        return {tower.view: tower.fingerprints() for tower in towers}

    def to(self, device: torch.device) -> "Target":
        """The target itself, its networks moved to the device."""
        for tower in (self.image, self.text, *self.thirds.values()):
            tower.to(device)
        return self


class TargetKind(NamedTuple):
    """One kind of target. forms: the names that a user can write. accepts: whether a name means this kind."""

    forms: str
    accepts: Callable[[str], bool]
    load: Callable[[str], Target]


class _PairTokens:
    """A main tokenizer as the input of a frozen tower."""

    def __init__(self, tokenizer: Tokenizer, described: dict[str, Any]) -> None:
        self._tokenizer, self._described = tokenizer, described

    def __call__(self, texts: Sequence[str]) -> Tensor:
        return self._tokenizer(texts)

    def lengths(self, tokens: Tensor) -> Tensor:
        return self._tokenizer.lengths(tokens)

    def as_dict(self) -> dict[str, Any]:
        return self._described


class _PairText(nn.Module):
    """A main text tower, which takes texts that are shorter than its context."""

    def __init__(self, text: nn.Module) -> None:
        super().__init__()
        self.text = text

    def forward(self, tokens: Tensor) -> Tensor:
        return encode_text(self.text, tokens)


def main_towers(run: FinishedRun, folder: Path) -> tuple[FrozenTower, FrozenTower]:
    """The main towers, of images and of texts, of the finished run that was loaded from a folder."""
    file = folder / "tokenizer.json"
    tokens = _PairTokens(
        run.tokenizer,
        {
            "text_cfg": run.tokenizer.text_cfg(),
            "context_length": run.architecture.model_cfg["text_cfg"].get("context_length", 77),
            "rules": digest_of(json.loads(file.read_bytes())) if file.is_file() else "open_clip",
        },
    )
    image = FrozenTower("img", str(folder), run.img, run.embed_dim, run.architecture.image)
    return image, FrozenTower("txt", str(folder), _PairText(run.txt), run.embed_dim, tokens)


def _load_run(name: str) -> Target:
    folder = Path(name)
    run = load_run(folder)
    image, text = main_towers(run, folder)
    return Target(name, image, text, run.scale, _thirds_of(folder, run.described["thirds"]))


def _thirds_of(folder: Path, described: Sequence[Mapping[str, Any]]) -> dict[str, FrozenTower]:
    """A run's frozen towers of images; one that is missing or has changed is left out, and that is said."""
    config = read_config(folder / "config.toml")
    towers = {}
    for third in described:
        if third["reads"] != "images":
            continue
        view, spec, reason = third["view"], third["spec"], "its weights or preprocessing have changed since"
        try:
            tower = load_frozen(spec, view, features=config.third_features, precision=config.third_precision)
        except ThreeTowersError as error:
            reason = str(error)
        else:
            if tower.fingerprint() == third["fingerprint"]:
                towers[view] = tower
                continue
        warn(f"{folder}: without its third tower {view} ({spec}): {reason}")
    return towers


def _load_open_clip(name: str) -> Target:
    if Path(name).is_dir():
        name = f"open_clip:local-dir:{name}"
    inner = name.removeprefix("open_clip:")
    pair = load_pair(inner, name, force_custom_text=True)
    image, text = image_side(*pair, name), text_side(*pair, inner, name)
    return _paired(name, image, text, pair[0].logit_scale)


class _HuggingFace(nn.Module):
    """One side of a transformers image-text model, through its own projection."""

    def __init__(self, model: Any, fill: int | None) -> None:
        super().__init__()
        self.model, self.fill = model, fill

    def forward(self, inputs: Tensor) -> Tensor:
        if self.fill is None:
            return self.model.get_image_features(pixel_values=inputs).pooler_output  # type: ignore[no-any-return]
        mask = inputs >= 0
        found = self.model.get_text_features(
            input_ids=inputs.where(mask, self.fill), attention_mask=mask.long()
        )
        return found.pooler_output  # type: ignore[no-any-return]


def _load_transformers(name: str) -> Target:
    source = name if name.startswith("hf:") else f"hf:{name}"
    folder = local_folder(source.removeprefix("hf:"), source, PROCESSORS)
    model, no_pooler = load_model(folder, source)
    if not hasattr(model, "get_image_features") or not hasattr(model, "get_text_features"):
        raise UsageError(
            f"{source}: {type(model).__name__} does not encode images and texts into one space; give a model such as "
            "CLIP, SigLIP or VisionTextDualEncoder"
        )
    if no_pooler:
        raise CheckpointError(
            f"{source}: this model was saved without its pooler, and a random one would mean nothing"
        )
    vision = getattr(model, "vision_model", model)
    tokenizer = load_hf_tokenizer(folder, source)
    text_config = getattr(model.config, "text_config", model.config)
    tokens = HuggingFaceTokens(tokenizer, token_limit(tokenizer, text_config))
    spec = image_spec(processor_settings(folder, source), source, num_channels(vision))
    image = _HuggingFace(model, None)
    with torch.no_grad():
        width = image(torch.zeros(1, len(spec.mean), spec.size, spec.size)).shape[1]
    text = Loaded(_HuggingFace(model, pad_id(tokenizer)), width, tokens)
    return _paired(name, Loaded(image, width, spec), text, model.logit_scale)


def _paired(name: str, image: Loaded, text: Loaded, log_scale: Tensor) -> Target:
    img, txt = (
        FrozenTower(view, name, side.module, side.width, side.inputs)
        for view, side in (("img", image), ("txt", text))
    )
    return Target(name, img, txt, float(log_scale.detach().exp()))


def _holds(file: str) -> Callable[[str], bool]:
    return lambda name: (Path(name) / file).is_file()


TARGETS: tuple[TargetKind, ...] = (
    TargetKind("a run folder", _holds("model.json"), _load_run),
    TargetKind(
        "open_clip:NAME@TAG, or a directory with open_clip_config.json",
        lambda name: name.startswith("open_clip:") or _holds("open_clip_config.json")(name),
        _load_open_clip,
    ),
    TargetKind(
        "hf:DIR_OR_ID, or a directory that save_pretrained wrote",
        lambda name: name.startswith("hf:") or _holds("config.json")(name),
        _load_transformers,
    ),
)
"""Every kind of model that a suite evaluates; the first that accepts a name loads it."""


def open_target(name: str, device: torch.device | str = "cpu") -> Target:
    """The model that a name means, in eval mode on the device; TARGETS lists the names.

    Raises UsageError for a name that means nothing and CheckpointError for weights that are missing, damaged or do not
    fit.
    """
    kind = next((kind for kind in TARGETS if kind.accepts(name)), None)
    if kind is None:
        if (Path(name) / "config.toml").is_file():
            load_run(name)  # says what is missing
        raise UsageError(f"{name}: no model. Give {', '.join(kind.forms for kind in TARGETS)}")
    return replace(kind.load(name), name=name).to(torch.device(device))
