"""Frozen towers that read texts: hf-text:DIR_OR_ID out of transformers, open_clip-text:NAME@TAG out of open_clip."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.model import _build_text_tower
from tokenizers import Tokenizer as FastTokenizer
from torch import Tensor, nn

from threetowers.data.tokenize import OPEN_CLIP_MARKS, marks_in_text, without_marks
from threetowers.errors import CheckpointError, UsageError
from threetowers.towers.frozen.base import (
    FEATURES,
    Card,
    Kind,
    Loaded,
    digest_of,
    first_line,
    foreign,
    num_parameters,
    pooled_only,
    token_mean,
)
from threetowers.towers.frozen.hf import (
    REMEDY,
    import_transformers,
    load_model,
    local_folder,
    no_pooler_error,
    quiet,
    skeleton,
)
from threetowers.towers.frozen.open_clip import known_config, known_tag, load_pair
from threetowers.towers.pair import encode_text, takes_short_text

VOCABULARIES = ("tokenizer.json", "tokenizer_config.json", "vocab.*", "*.model", "*.tiktoken")
"""Where transformers looks for a tokenizer; of these files any is enough."""


class HuggingFaceTokens:
    """A transformers tokenizer: ids as its own call gives them, padded on the right.

    Padding is -1, since some vocabularies pad with their end token. Tokenizers that ask for no attention mask
    (SigLIP's) pad every text to full length with ids that their model reads, and so does this.
    """

    def __init__(self, tokenizer: Any, limit: int) -> None:
        self._tokenizer, self.limit = tokenizer, limit
        self.pads_fully = "attention_mask" not in tokenizer.model_input_names
        self.marks = _take_for_text(tokenizer)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        rows = self._tokenizer(
            [without_marks(str, self.marks, text) for text in texts],
            truncation=True,
            max_length=self.limit,
            padding="max_length" if self.pads_fully else False,
        )["input_ids"]
        tokens = torch.full((len(rows), max([1, *map(len, rows)])), -1, dtype=torch.int64)
        for index, row in enumerate(rows):
            # an empty text without special tokens still needs one token to be the mean of
            tokens[index, : max(len(row), 1)] = torch.tensor(row or [pad_id(self._tokenizer)])
        return tokens

    def ordinary_ids(self) -> list[int]:
        """Two ids that are no special tokens; fewer where the vocabulary has no more."""
        special = set(self._tokenizer.all_special_ids)
        return [id for id in sorted(self._tokenizer.get_vocab().values()) if id not in special][:2]

    def lengths(self, tokens: Tensor) -> Tensor:
        return (tokens >= 0).sum(dim=1)

    def as_dict(self) -> dict[str, Any]:
        if self._tokenizer.is_fast:
            rules = json.loads(self._tokenizer.backend_tokenizer.to_str())
            rules.pop("truncation", None), rules.pop("padding", None)  # the last call's, not the vocabulary's
        else:
            rules = {"vocab": self._tokenizer.get_vocab(), "options": repr(self._tokenizer.init_kwargs)}
        return {"kind": type(self._tokenizer).__name__, "limit": self.limit, "rules": digest_of(rules)}


def _take_for_text(tokenizer: Any) -> tuple[str, ...]:
    """Makes a transformers tokenizer read its special tokens as text in the midst of a text.

    Returns those that it finds nevertheless.
    """
    tokenizer.split_special_tokens = True
    ids = {mark: tokenizer.convert_tokens_to_ids(mark) for mark in tokenizer.all_special_tokens}
    return marks_in_text(ids, lambda text: tokenizer(text)["input_ids"])


class HuggingFaceText(nn.Module):
    """A transformers text model: token ids [B, n], -1 behind the text, to features [B, P]."""

    def __init__(self, model: nn.Module, features: str, pad_id: int) -> None:
        super().__init__()
        self.model, self.features, self.pad_id = model, features, pad_id

    def forward(self, tokens: Tensor) -> Tensor:
        mask = tokens >= 0
        found = self.model(input_ids=tokens.where(mask, self.pad_id), attention_mask=mask.long())
        if self.features == "pooled":
            return found.pooler_output  # type: ignore[no-any-return]
        states: Tensor = found.last_hidden_state
        return states[:, 0] if self.features == "cls" else token_mean(states, mask)


def pad_id(tokenizer: Any) -> int:
    """The id that fills what attention does not look at; any will do when the tokenizer names none."""
    return 0 if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)


def load_hf_text(name: str, features: str) -> Loaded:
    """A text model (BERT, sentence encoders, the text tower of CLIP or SigLIP …) with its tokenizer.

    Raises UsageError for features it has not, CheckpointError for files that are missing or weights that do not fit.
    """
    source = f"hf-text:{name}"
    folder = local_folder(name, source, VOCABULARIES)
    model, no_pooler = load_model(folder, source)
    model = getattr(model, "text_model", model)  # of an image-text model the text side is meant
    if no_pooler:
        model.pooler = None
    tokenizer = load_hf_tokenizer(folder, source)
    tokens = HuggingFaceTokens(tokenizer, token_limit(tokenizer, model.config))
    module = HuggingFaceText(model, features, pad_id(tokenizer))
    width = _width(module, tokens, source)
    if width == 0:
        others = [
            other
            for other in FEATURES
            if other != features and _width(HuggingFaceText(model, other, module.pad_id), tokens, source)
        ]
        if no_pooler and features == "pooled":
            raise no_pooler_error(source, others)
        why = f"the first token of {source} sees nothing of the text behind it, which cls would be"
        if features != "cls":
            why = f"{source} has no {features} features"
        raise UsageError(f"third_features: {why}; take {' or '.join(others) or 'another model'}")
    return Loaded(module, width, tokens)


@torch.no_grad()
def _width(module: HuggingFaceText, tokens: HuggingFaceTokens, source: str) -> int:
    """P; 0 when the model has no such features, or such that do not depend on what stands in a text.

    Raises UsageError for a model that does not read texts alone.
    """
    ids = tokens(["a b c d e"]).repeat(2, 1)
    ordinary = tokens.ordinary_ids()
    inside = slice(1, max(int((ids[0] >= 0).sum()) - 1, 2))
    for row, id in zip(ids, ordinary, strict=False):
        row[inside] = row[inside].where(row[inside] < 0, id)
    try:
        found = module(ids)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise UsageError(
            f"third: {source}: not a model of texts that reads on its own ({first_line(error)})"
        ) from error
    except AttributeError:
        found = None
    if found is None or (module.features == "cls" and torch.equal(found[0], found[1])):
        return 0
    return int(found.shape[1])


def load_hf_tokenizer(name: str, source: str) -> Any:
    """transformers' tokenizer of that name; raises CheckpointError."""
    transformers = import_transformers(source)
    with quiet(transformers), foreign(source, "the tokenizer", REMEDY, hub=not Path(name).is_dir()):
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    if len(tokenizer.get_vocab()) <= len(tokenizer.all_special_ids):
        raise CheckpointError(  # the library makes such a one when it finds no vocabulary
            f"{source}: the tokenizer has no vocabulary; tokenizer.json or the vocabulary's own file is missing"
        )
    return tokenizer


def fast_rules(loaded: Any, source: str) -> FastTokenizer:
    """A copy of transformers' tokenizer as one of `tokenizers`; raises UsageError for one that cannot be that."""
    if not loaded.is_fast:
        raise UsageError(
            f"{source}: {type(loaded).__name__} has no form in tokenizer.json; save the model with a fast tokenizer"
        )
    rules: FastTokenizer = FastTokenizer.from_str(loaded.backend_tokenizer.to_str())
    return rules


def token_limit(tokenizer: Any, config: Any) -> int:
    """The longest text that tokenizer and model take, in tokens."""
    positions = getattr(config, "max_position_embeddings", None) or 512
    declared = tokenizer.model_max_length
    # an undeclared limit is a huge number; RoBERTa's kin count their positions from two
    return min(declared, positions) if declared < 1_000_000 else max(positions - 2, 1)


class OpenClipTokens:
    """The tokenizer that open_clip pairs with a model: ids of the model's context length."""

    def __init__(self, tokenizer: Any, text: Any, described: dict[str, Any]) -> None:
        self._tokenizer, self._text, self._described = tokenizer, text, described
        inner = getattr(tokenizer, "tokenizer", None)
        marks = OPEN_CLIP_MARKS if inner is None else _take_for_text(inner)
        tokenizer.clean_fn = partial(without_marks, tokenizer.clean_fn, marks)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        return self._tokenizer(list(texts)).long()  # type: ignore[no-any-return]

    def lengths(self, tokens: Tensor) -> Tensor:
        if not takes_short_text(self._text):
            # such a tower may look at its padding, which is part of the text then
            return torch.full((len(tokens),), tokens.shape[1])
        ends: Tensor = tokens
        if self._text.pool_type == "eos":
            ends = (tokens == self._text.eos_id).int()
        return ends.argmax(dim=1) + 1

    def as_dict(self) -> dict[str, Any]:
        inner = getattr(self._tokenizer, "tokenizer", None)
        vocabulary = self._tokenizer.encoder if inner is None else inner.get_vocab()
        return {
            "kind": type(self._tokenizer).__name__,
            "text_cfg": self._described,
            "vocabulary": digest_of(vocabulary),
        }


class OpenClipText(nn.Module):
    """The text tower of an open_clip model: token ids [B, n] to features [B, P], in the pair's space."""

    def __init__(self, text: nn.Module) -> None:
        super().__init__()
        self.text = text

    def forward(self, tokens: Tensor) -> Tensor:
        # other towers are fed at the length that their tokenizer pads to
        short = takes_short_text(self.text)
        return encode_text(self.text, tokens) if short else self.text(tokens)  # type: ignore[no-any-return]


def load_open_clip_text(name: str, features: str) -> Loaded:
    """The text tower of an open_clip model with its own tokenizer; raises as open_clip: does."""
    source = f"open_clip-text:{name}"
    pooled_only(source, features)
    return text_side(*load_pair(name, source, force_custom_text=True), name, source)


def text_side(model: Any, config: dict[str, Any], name: str, source: str) -> Loaded:
    """The text tower of what `load_pair` returned for a name, with its tokenizer; raises CheckpointError."""
    with foreign(source, "the tokenizer"):
        tokenizer = open_clip.get_tokenizer(name if name.startswith("local-dir:") else name.partition("@")[0])
    tokens = OpenClipTokens(tokenizer, model.text, config["text_cfg"])
    return Loaded(OpenClipText(model.text), config["embed_dim"], tokens)


def hf_text_card(spec: str, name: str) -> Card:
    """The card of a text model; raises as `load_hf_text` does."""
    whole = skeleton(spec, name)
    model = getattr(whole, "text_model", whole)
    tokenizer = load_hf_tokenizer(name, spec)
    limit = token_limit(tokenizer, model.config)
    return Card(spec, num_parameters(model), model.config.hidden_size, context=limit)


def open_clip_text_card(spec: str, name: str) -> Card:
    """The card of published weights; the network is built without memory."""
    model, _, tag = name.partition("@")
    config = known_config(model)
    known_tag(model, tag, "open_clip-text")
    section = {**config["text_cfg"], "hf_model_pretrained": False}
    with torch.device("meta"), foreign(spec, "the network"):
        text = _build_text_tower(config["embed_dim"], section, config.get("quick_gelu", False))
    return Card(spec, num_parameters(text), config["embed_dim"], context=section.get("context_length", 77))


HF_TEXT = Kind(
    prefix="hf-text",
    reads="texts",
    forms=("hf-text:DIR_OR_ID",),
    help="a transformers text model with its tokenizer, as third tower of 3t",
    load=load_hf_text,
    card=hf_text_card,
)
OPEN_CLIP_TEXT = Kind(
    prefix="open_clip-text",
    reads="texts",
    forms=("open_clip-text:NAME@TAG", "open_clip-text:local-dir:DIR"),
    help="the text tower of an open_clip model, likewise",
    load=load_open_clip_text,
    card=open_clip_text_card,
)
