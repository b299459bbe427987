"""Main towers that start at the weights of another model: where those come from, and what comes with them.

An image tower starts at any frozen tower, of which a copy trains. A text tower starts at that of an open_clip pair or
of a run, or at a sentence encoder in transformers' format, together with its tokenizer.
Legend: D width of the shared space, W width of a sentence encoder.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from threetowers.data.tokenize import Tokenizer, load_tokenizer
from threetowers.errors import CheckpointError, UsageError
from threetowers.towers.frozen.file import FILE
from threetowers.towers.frozen.load import kind_of
from threetowers.towers.frozen.open_clip import OPEN_CLIP, load_pair
from threetowers.towers.frozen.text import HF_TEXT
from threetowers.towers.heads import head
from threetowers.towers.sentences import read_encoder
from threetowers.towers.weights import load_strictly, read_safetensors

FORMS = "open_clip:NAME@TAG, open_clip:NAME@FILE, hf-text:DIR_OR_ID or file:RUN"


@dataclass(frozen=True)
class TextStart:
    """A text tower to start at.

    spec: as the user wrote it. config: open_clip's text_cfg. width: D of a half of a pair, W of a sentence encoder.
    state: the weights of that tower. in_pair: whether it is half of a pair, whose space the new pair keeps.
    """

    spec: str
    config: dict[str, Any]
    width: int
    tokenizer: Tokenizer
    state: dict[str, Tensor]
    in_pair: bool = True

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
    _refuse_quick_gelu(spec, config)
    prefix = "txt."
    place = named if named == "open_clip" else str(folder / named)
    state = read_safetensors(folder / "model.safetensors")
    return TextStart(
        spec,
        dict(config["text_cfg"]),
        int(config["embed_dim"]),
        load_tokenizer(place, int(config["text_cfg"].get("context_length", 77))),
        {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)},
    )


def _of_open_clip(spec: str, name: str) -> TextStart:
    model, config = load_pair(name, spec, force_custom_text=True)
    _refuse_quick_gelu(spec, config)
    text = dict(config["text_cfg"])
    if foreign := [key for key in ("hf_model_name", "hf_tokenizer_name") if text.get(key)]:
        raise UsageError(
            f"start.text: {spec!r} has a tokenizer that is not open_clip's ({foreign[0]} = {text[foreign[0]]!r}); such "
            "a text tower is not supported here"
        )
    tokenizer = load_tokenizer("open_clip", int(text.get("context_length", 77)))
    return TextStart(spec, text, int(config["embed_dim"]), tokenizer, dict(model.text.state_dict()))


def _refuse_quick_gelu(spec: str, config: dict[str, Any]) -> None:
    """open_clip keeps QuickGELU as a key of the whole model, which a pair with another image tower cannot take over."""
    if config.get("quick_gelu"):
        raise UsageError(
            f"start.text: {spec!r} has QuickGELU, which open_clip sets for both towers at once. Give the whole "
            "pair: pair.model = NAME-quickgelu with pair.weights"
        )


def is_half_of_pair(spec: str) -> bool:
    """Whether a tower of images ends in the space of a pair, so that it needs no further projection."""
    kind, name = kind_of(spec)
    return kind is OPEN_CLIP or (kind is FILE and (Path(name) / "model.json").is_file())
