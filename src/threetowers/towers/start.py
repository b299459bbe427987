"""Main towers that start at the weights of another model: where those come from, and what comes with them.

An image tower starts at any frozen tower, of which a copy trains. A text tower starts at that of an open_clip pair or
of a run, together with its tokenizer.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from threetowers.errors import CheckpointError, UsageError
from threetowers.towers.frozen.file import FILE
from threetowers.towers.frozen.load import kind_of
from threetowers.towers.frozen.open_clip import OPEN_CLIP, load_pair
from threetowers.towers.weights import load_strictly, read_safetensors

FORMS = "open_clip:NAME@TAG, open_clip:NAME@FILE or file:RUN"


@dataclass(frozen=True)
class TextStart:
    """A text tower to start at.

    spec: as the user wrote it. config: open_clip's text_cfg. width: D. tokenizer: as `pair.tokenizer` names it.
    """

    spec: str
    config: dict[str, Any]
    width: int
    tokenizer: str
    state: dict[str, Tensor]

    @property
    def context_length(self) -> int:
        return int(self.config.get("context_length", 77))

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
    raise UsageError(f"start.text: {spec!r} is no text tower to train. Write {FORMS}")


def _of_run(spec: str, folder: Path) -> TextStart:
    path = folder / "model.json"
    if not path.is_file():
        raise CheckpointError(f"start.text: {spec}: no finished run (model.json) is there")
    described = json.loads(path.read_text(encoding="utf-8"))
    config, named = described["model_cfg"], described["tokenizer"]
    _refuse_quick_gelu(spec, config)
    prefix = "txt."
    state = read_safetensors(folder / "model.safetensors")
    return TextStart(
        spec,
        dict(config["text_cfg"]),
        int(config["embed_dim"]),
        named if named == "open_clip" else str(folder / named),
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
    return TextStart(spec, text, int(config["embed_dim"]), "open_clip", dict(model.text.state_dict()))


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
