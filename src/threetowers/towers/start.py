"""Main towers that start at the weights of another model: where those come from, and what comes with them.

An image tower starts at any frozen tower, of which a copy trains. A text tower starts at that of an open_clip pair, of
a CLIPModel of transformers or of a run, or at a sentence encoder in transformers' format, together with its tokenizer.
Legend: D width of the shared space, W width of a sentence encoder.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from threetowers.config import PairConfig
from threetowers.data.tokenize import Tokenizer, load_tokenizer
from threetowers.errors import CheckpointError, UsageError
from threetowers.towers.clip import load_image_half, load_text_half
from threetowers.towers.frozen.base import FrozenTower
from threetowers.towers.frozen.file import FILE
from threetowers.towers.frozen.hf import HF
from threetowers.towers.frozen.load import kind_of, load_frozen
from threetowers.towers.frozen.open_clip import OPEN_CLIP, load_pair
from threetowers.towers.frozen.text import HF_TEXT
from threetowers.towers.heads import head
from threetowers.towers.pair import has_quick_gelu
from threetowers.towers.sentences import read_encoder
from threetowers.towers.weights import load_strictly, read_safetensors

FORMS = "open_clip:NAME@TAG, open_clip:NAME@FILE, hf:DIR_OR_ID, hf-text:DIR_OR_ID or file:RUN"


@dataclass(frozen=True)
class TextStart:
    """A text tower to start at.

    spec: as the user wrote it. config: open_clip's text_cfg. width: D of a half of a pair, W of a sentence encoder.
    state: the weights of that tower. in_pair: whether it is half of a pair, whose space the new pair keeps. quick_gelu:
    whether it has QuickGELU, as half of a pair.
    """

    spec: str
    config: dict[str, Any]
    width: int
    tokenizer: Tokenizer
    state: dict[str, Tensor]
    in_pair: bool = True
    quick_gelu: bool = False

    def projected(self, embed_dim: int, seed: int, *, always: bool) -> "TextStart":
        """A sentence encoder with a new projection [D, W], which starts as heads do; half of a pair as it is.

        always: with one even where the widths agree.
        """
        if self.in_pair or (self.width == embed_dim and not always):
            return self
        weight = head(self.width, embed_dim, seed=seed, name="txt").weight.detach()
        config = {**self.config, "hf_proj_type": "linear"}
        return replace(self, config=config, state={**self.state, "proj.weight": weight}, width=embed_dim)

    def load_into(self, tower: nn.Module) -> None:
        """Gives a tower of the same architecture the weights; raises CheckpointError for what does not fit."""
        load_strictly(tower, self.state, self.spec)


def text_start(spec: str) -> TextStart:
    """The text tower that `start.text` names.

    Raises UsageError for a name that means none, CheckpointError for files that are missing or damaged.
    """
    kind, name = kind_of(spec, key="start.text")
    if kind is FILE:
        return _of_run(spec, Path(name))
    if kind is OPEN_CLIP:
        return _of_open_clip(spec, name)
    if kind is HF:
        half = load_text_half(spec, name)
        return _half_of_pair(spec, half.tower, half.text_cfg, half.width, half.tokenizer)
    if kind is HF_TEXT:
        encoder = read_encoder(spec, name)
        return TextStart(
            spec, encoder.text_cfg, encoder.width, encoder.tokenizer, encoder.state, in_pair=False
        )
    raise UsageError(f"start.text: {spec!r} is no text tower to train. Write {FORMS}")


def _of_run(spec: str, folder: Path) -> TextStart:
    path = folder / "model.json"
    if not path.is_file():
        raise CheckpointError(f"start.text: {spec}: no finished run (model.json) is there")
    described = json.loads(path.read_text(encoding="utf-8"))
    config, named = described["model_cfg"], described["tokenizer"]
    prefix = "txt."
    place = named if named == "open_clip" else str(folder / named)
    state = read_safetensors(folder / "model.safetensors")
    return TextStart(
        spec,
        dict(config["text_cfg"]),
        int(config["embed_dim"]),
        load_tokenizer(place, int(config["text_cfg"].get("context_length", 77))),
        {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)},
        quick_gelu=bool(config.get("quick_gelu")),
    )


def _of_open_clip(spec: str, name: str) -> TextStart:
    model, config = load_pair(name, spec, force_custom_text=True)
    text = dict(config["text_cfg"])
    if foreign := [key for key in ("hf_model_name", "hf_tokenizer_name") if text.get(key)]:
        raise UsageError(
            f"start.text: {spec!r} has a tokenizer that is not open_clip's ({foreign[0]} = {text[foreign[0]]!r}); such "
            "a text tower is not supported here"
        )
    tokenizer = load_tokenizer("open_clip", int(text.get("context_length", 77)))
    own = tokenizer.text_cfg()["vocab_size"]
    if text.get("vocab_size", own) != own:
        raise CheckpointError(
            f"start.text: {spec!r} knows {text['vocab_size']:,} tokens, and open_clip's tokenizer has {own:,}; "
            "such a text tower is not supported here"
        )
    return _half_of_pair(spec, model.text, text, int(config["embed_dim"]), tokenizer)


def _half_of_pair(
    spec: str, tower: nn.Module, config: dict[str, Any], width: int, tokenizer: Tokenizer
) -> TextStart:
    state = dict(tower.state_dict())
    return TextStart(spec, config, width, tokenizer, state, quick_gelu=has_quick_gelu(tower))


def image_start(spec: str) -> FrozenTower:
    """The tower that `start.image` names, for its weights: of a CLIPModel of transformers in open_clip's form.

    Raises UsageError for a name that means none, CheckpointError for files that are missing or damaged.
    """
    kind, name = kind_of(spec, key="start.image")
    if kind is not HF:
        return load_frozen(spec, "start")
    half = load_image_half(spec, name)
    return FrozenTower("start", spec, half.module, half.width, half.inputs, half.vision_cfg)


def one_activation(
    pair: PairConfig, model_cfg: dict[str, Any], image: FrozenTower | None, text: TextStart | None
) -> bool:
    """Whether the towers of a pair have QuickGELU, which open_clip keeps as one key for both of them.

    image, text: what they start at. A tower that `pair` describes without a model's name has what the other has; timm
    networks and encoders of transformers keep their own whatever the key says. Raises UsageError for two that differ.
    """
    found: dict[str, bool] = {}
    if image is not None and isinstance(image.module, VisionTransformer):
        found[f"the image tower of {image.spec!r}"] = has_quick_gelu(image.module)
    if text is not None and _takes_quick_gelu(text.config):
        found[f"the text tower of {text.spec!r}"] = text.quick_gelu
    fresh = [model_cfg["vision_cfg"]] * (image is None) + [model_cfg["text_cfg"]] * (text is None)
    if pair.model is not None and any(map(_takes_quick_gelu, fresh)):
        found[f"pair.model = {pair.model!r}"] = bool(model_cfg.get("quick_gelu"))
    if len(set(found.values())) == 2:
        with_it, without = (
            next(each for each, has in found.items() if has is quick) for quick in (True, False)
        )
        raise UsageError(
            f"start: {with_it} has QuickGELU and {without} has not, and open_clip has one activation for both towers "
            "of a pair. Start both at models that agree, or take pair.model of the other kind (NAME or NAME-quickgelu)"
        )
    quick = next(iter(found.values()), False)
    if quick and pair.model is None and any(map(_takes_quick_gelu, fresh)):
        (with_it, *_) = found
        print(f"note: {with_it} has QuickGELU, and the new tower beside it gets it too", file=sys.stderr)
    return quick


def _takes_quick_gelu(section: Mapping[str, Any]) -> bool:
    """Whether open_clip's key decides about the activation of a tower: not of timm, transformers or a ResNet."""
    others = section.get("timm_model_name") or section.get("hf_model_name")
    return not others and not isinstance(section.get("layers"), list | tuple)


def is_half_of_pair(spec: str) -> bool:
    """Whether a tower of images ends in the space of a pair, so that it needs no further projection."""
    kind, name = kind_of(spec)
    return kind in (OPEN_CLIP, HF) or (kind is FILE and (Path(name) / "model.json").is_file())
