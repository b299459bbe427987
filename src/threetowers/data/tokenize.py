"""Turns captions into token ids, with open_clip's vocabulary, a tokenizer.json, or one learned from the captions."""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from open_clip.tokenizer import SimpleTokenizer, get_clean_fn
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

from threetowers.errors import UsageError
from threetowers.files import write_whole

PAD, START, END = "<pad>", "<start>", "<end>"
OPEN_CLIP_MARKS = ("<start_of_text>", "<end_of_text>")
_open_clip_clean = get_clean_fn("whitespace")


def clean(text: str) -> str:
    """Cleans a text as open_clip does before it applies a tokenizer.json, so that exported models agree.

    Wrongly decoded characters, HTML entities and white space are corrected. Printable ASCII without entities can only
    have white space to correct.
    """
    if text.isascii() and text.isprintable() and "&" not in text:
        return " ".join(text.split())
    return _open_clip_clean(text)  # type: ignore[no-any-return]


def without_marks(clean: Callable[[str], str], marks: Sequence[str], text: str) -> str:
    """The cleaned text, in which a space keeps apart what a tokenizer would take for one of its special tokens."""
    text = clean(text)
    for mark in marks:
        text = re.sub(
            re.escape(mark), lambda found: f"{found[0][0]} {found[0][1:]}", text, flags=re.IGNORECASE
        )
    return text


def marks_in_text(specials: Mapping[str, int], encode: Callable[[str], Sequence[int]]) -> tuple[str, ...]:
    """The special tokens, given with their ids, that a tokenizer still finds in the midst of a text."""
    own = encode("a b").count  # of those that it sets around every text
    return tuple(mark for mark, id in specials.items() if encode(f"a {mark} b").count(id) > own(id))


class Tokenizer(Protocol):
    """Turns captions into the ids that a text tower takes."""

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Token ids, int64 [B, context_length]; a caption that is cut still ends with the end token."""
        ...

    def lengths(self, tokens: Tensor) -> Tensor:
        """Number of ids up to and including the end token, int64 [B]."""
        ...

    def is_cut(self, texts: Sequence[str]) -> list[bool]:
        """Whether each caption has more ids than the context length and loses its end."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, with the special tokens that the text tower sees."""
        ...

    def text_cfg(self) -> dict[str, Any]:
        """The keys of open_clip's text_cfg that depend on the vocabulary."""
        ...

    def save(self, folder: Path) -> None:
        """Writes the files from which `load_tokenizer` and open_clip's local-dir make the same ids."""
        ...

    def differences(self) -> Sequence[str]:
        """In which texts open_clip makes other ids out of the saved files, a line for each kind of them."""
        ...


class OpenClipTokenizer:
    """CLIP's byte-pair vocabulary of 49,408 tokens, as open_clip ships it."""

    def __init__(self, context_length: int) -> None:
        self._tokenize = SimpleTokenizer(context_length=context_length)
        self._tokenize.clean_fn = partial(without_marks, self._tokenize.clean_fn, OPEN_CLIP_MARKS)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        return self._tokenize(list(texts)).long()  # type: ignore[no-any-return]

    def lengths(self, tokens: Tensor) -> Tensor:
        return tokens.argmax(dim=1) + 1  # the end token is the highest id

    def is_cut(self, texts: Sequence[str]) -> list[bool]:
        most = self._tokenize.context_length - 2  # start and end are not among the ids of `encode`
        return [len(self._tokenize.encode(text)) > most for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenize.decode(list(ids)).strip()  # type: ignore[no-any-return]

    def text_cfg(self) -> dict[str, Any]:
        return {"vocab_size": self._tokenize.vocab_size}

    def save(self, folder: Path) -> None:
        pass  # open_clip has this vocabulary built in

    def differences(self) -> Sequence[str]:
        return (_other_ids(OPEN_CLIP_MARKS),)


class FileTokenizer:
    """A tokenizer.json of Hugging Face's `tokenizers`; captions are cut and padded to the context length."""

    def __init__(self, tokenizer: FastTokenizer, context_length: int, source: str = "tokenizer.json") -> None:
        self.pad_id = _pad_id(tokenizer)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        ends = {tokenizer.encode(text).ids[-1] for text in ("a", "b c") if tokenizer.encode(text).ids}
        if len(ends) != 1:
            raise UsageError(
                f"{source}: captions get no common end token; add a post-processor that appends one to the tokenizer"
            )
        self.end_id = ends.pop()
        self.context_length = context_length
        tokenizer.enable_truncation(max_length=context_length)
        tokenizer.enable_padding(
            length=context_length, pad_id=self.pad_id, pad_token=tokenizer.id_to_token(self.pad_id)
        )
        self._tokenizer = tokenizer
        self._marks: tuple[str, ...] = ()
        specials = {t.content: id for id, t in tokenizer.get_added_tokens_decoder().items() if t.special}
        # the end token need not be declared as special
        specials[str(tokenizer.id_to_token(self.end_id))] = self.end_id
        self._marks = marks_in_text(specials, self._ids)

    def _ids(self, text: str) -> list[int]:
        """The ids of a text without the padding behind it."""
        entry = self._encode([text])[0]
        return [id for id, mask in zip(entry.ids, entry.attention_mask, strict=True) if mask]

    def __call__(self, texts: Sequence[str]) -> Tensor:
        return torch.from_numpy(np.array([entry.ids for entry in self._encode(texts)], dtype=np.int64))

    def _encode(self, texts: Sequence[str]) -> Sequence[Any]:
        """A text that looks like a special token is text."""
        self._tokenizer.encode_special_tokens = True  # a copy in a loader process does not inherit it
        return self._tokenizer.encode_batch([without_marks(clean, self._marks, text) for text in texts])  # type: ignore[no-any-return]

    def lengths(self, tokens: Tensor) -> Tensor:
        return (tokens == self.end_id).int().argmax(dim=1) + 1

    def is_cut(self, texts: Sequence[str]) -> list[bool]:
        return [bool(entry.overflowing) for entry in self._encode(texts)]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def text_cfg(self) -> dict[str, Any]:
        return {
            "vocab_size": self._tokenizer.get_vocab_size(),
            "pool_type": "eos",
            "eos_id": self.end_id,
            "pad_id": self.pad_id,
            "hf_tokenizer_name": "tokenizer",  # open_clip reads the files beside the config when this is not empty
        }

    def save(self, folder: Path) -> None:
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": self.context_length,
            "pad_token": self._tokenizer.id_to_token(self.pad_id),
            "eos_token": self._tokenizer.id_to_token(self.end_id),
            "split_special_tokens": True,  # in the midst of a text they are text
        }
        write_whole(folder / "tokenizer_config.json", json.dumps(config, indent=2))
        write_whole(
            folder / "tokenizer.json", self._tokenizer.to_str(pretty=True)
        )  # last: a run looks for it

    def differences(self) -> Sequence[str]:
        return (_other_ids(self._marks),) if self._marks else ()


def _other_ids(marks: Sequence[str]) -> str:
    return (
        f"open_clip takes {' and '.join(marks)} inside a text for special tokens, and drops what follows. Training "
        "took them for text."
    )


def _pad_id(tokenizer: FastTokenizer) -> int:
    if tokenizer.padding:
        return int(tokenizer.padding["pad_id"])
    for token in (PAD, "[PAD]", "<|pad|>"):
        if (id := tokenizer.token_to_id(token)) is not None:
            return int(id)
    return 0


def train_tokenizer(captions: Iterable[str], *, vocab_size: int, context_length: int) -> FileTokenizer:
    """Learns a lower-casing byte-level BPE from the captions. It encodes any script and has no unknown token.

    Ids: 0 is padding, 1 the start and 2 the end of a caption. The result depends on the captions and their order only.
    """
    tokenizer = FastTokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=max(vocab_size, 256 + 3),
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((clean(caption) for caption in captions), trainer=trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (START, END)],
    )
    return FileTokenizer(tokenizer, context_length)


def load_tokenizer(name: str, context_length: int) -> Tokenizer:
    """Loads `open_clip`'s tokenizer, a tokenizer.json, or one in a folder. Raises UsageError if it cannot be read."""
    if name == "open_clip":
        return OpenClipTokenizer(context_length)
    path = Path(name)
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise UsageError(
            f"pair.tokenizer: {name!r} is neither open_clip, trained, nor a tokenizer.json or its folder"
        )
    try:
        tokenizer = FastTokenizer.from_file(str(path))
    except Exception as error:  # the Rust side raises bare Exception for every defect of the file
        raise UsageError(f"{path}: not a tokenizer that `tokenizers` can read ({error})") from None
    return FileTokenizer(tokenizer, context_length, str(path))
