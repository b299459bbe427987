"""Captions that hold the names of special tokens are text, in every tokenizer."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from kit.mistakes import text_reader
from kit.runs import Config
from kit.towers import open_clip_folder, text_tower
from threetowers.data.tokenize import FileTokenizer, OpenClipTokenizer, load_tokenizer, train_tokenizer
from threetowers.export.open_clip import export_open_clip
from threetowers.train.loop import train

MARKS = (
    "<end>", "<start>", "<pad>", "</s>", "[SEP]", "[CLS]", "[PAD]", "<|endoftext|>", "<start_of_text>", "<END_of_text>",
)  # fmt: skip
PLAIN = ["a red circle", "", "it's 3 < 4 & a [box]", "sign 1", "ein großes Haus"]


def trained(context_length: int = 32) -> FileTokenizer:
    return train_tokenizer(
        [*PLAIN, "the end of the start"] * 5, vocab_size=400, context_length=context_length
    )


def unsplit(*special: str) -> Tokenizer:
    """Words at blanks alone, so that the name of a special token is a word of the vocabulary."""
    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "sign", "1", "2", "a", "[", "SEP]"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.add_special_tokens(list(special))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return tokenizer


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "trained": trained,
    "open_clip": lambda: OpenClipTokenizer(32),
    "whole words": lambda: FileTokenizer(unsplit("[PAD]", "[CLS]", "[SEP]"), 32),
    "an end that is not declared": lambda: FileTokenizer(unsplit("[PAD]", "[CLS]"), 32),
}


@pytest.mark.parametrize("mark", MARKS)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_caption_with_a_special_token_in_it_is_read_to_its_end(name: str, mark: str) -> None:
    tokenizer = TOKENIZERS[name]()
    for copy in (tokenizer, pickle.loads(pickle.dumps(tokenizer))):
        tokens = copy([f"{mark} sign 1", f"{mark} sign 2", f"a {mark}{mark} sign 1"])
        lengths = copy.lengths(tokens).tolist()
        assert tokens[0, : lengths[0]].tolist() != tokens[1, : lengths[1]].tolist()
        for row, length in zip(tokens.tolist(), lengths, strict=True):
            inside = row[1 : length - 1]
            assert len(inside) > 2 and row[0] not in inside and row[length - 1] not in inside
            assert not any(row[length:]), "nothing of the text stands behind its end"
        assert copy.is_cut([f"{mark} sign " * 40]) == [True]


def test_ids_of_ordinary_captions_are_those_of_the_vocabulary() -> None:
    ours, theirs = trained(), Tokenizer.from_str(trained()._tokenizer.to_str())
    theirs.no_padding()
    for text in [text for text in PLAIN if text]:
        tokens = ours([text])
        assert tokens[0, : ours.lengths(tokens)[0]].tolist() == theirs.encode(text).ids
    assert torch.equal(OpenClipTokenizer(32)(PLAIN), open_clip.tokenize(PLAIN, 32))


@pytest.mark.parametrize("mark", ["[SEP]", "[CLS]", "[PAD]", "[MASK]", "</s>"])
def test_texts_for_a_frozen_tower_out_of_transformers(mark: str, tmp_path: Path) -> None:
    text_reader(tmp_path / "reader")
    tower = text_tower(f"hf-text:{tmp_path / 'reader'}")
    first, second = tower.tokenizer([f"{mark} a", f"{mark} b"]).tolist()
    assert first != second
    special = {0, 2, 3, 4}  # [PAD], [CLS], [SEP], [MASK]
    assert not special & set(first[1:-1]) and first[0] == 2 and first[-1] == 3
    assert tower.tokenizer(["a b"]).tolist()[0][0] == 2


@pytest.mark.parametrize("mark", ["<end_of_text>", "<start_of_text>", "<END_OF_TEXT>"])
def test_texts_for_a_frozen_tower_out_of_open_clip(mark: str, tmp_path: Path) -> None:
    tower = text_tower(f"open_clip-text:local-dir:{open_clip_folder(tmp_path, 16, 49408, custom_text=True)}")
    tokens = tower.tokenizer([f"{mark} sign 1", f"{mark} sign 2"])
    assert tower.tokenizer.lengths(tokens)[0] > 4 and not torch.equal(tokens[0], tokens[1])
    assert not torch.equal(*tower(tokens))
    assert torch.equal(tower.tokenizer(PLAIN), open_clip.tokenize(PLAIN, 16))
    pickle.dumps(tower.tokenizer)


def test_open_clip_reads_the_exported_tokenizer_alike_or_the_card_says_where_not(
    tiny_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [f"a {mark} sign 1" for mark in MARKS]
    train(tiny_config(method="baseline", third=(), steps=1), tmp_path / "run")
    folder = export_open_clip(tmp_path / "run", tmp_path / "exported")
    ours = load_tokenizer(str(folder), 16)
    assert torch.equal(open_clip.get_tokenizer(f"local-dir:{folder}")(texts), ours(texts))
    assert "special tokens" not in (folder / "README.md").read_text() + capsys.readouterr().err
    said = OpenClipTokenizer(16).differences()
    assert len(said) == 1 and "<start_of_text> and <end_of_text>" in said[0]
    theirs = open_clip.get_tokenizer("ViT-B-32", context_length=16)
    differ = [mark for mark, text in zip(MARKS, texts, strict=True)
              if not torch.equal(theirs([text]), OpenClipTokenizer(16)([text]))]  # fmt: skip
    assert differ == ["<start_of_text>", "<END_of_text>"]


def test_a_saved_tokenizer_that_cannot_be_told_is_named(tmp_path: Path) -> None:
    tokenizer = FileTokenizer(unsplit("[PAD]", "[CLS]", "[SEP]"), 16)
    assert [line for line in tokenizer.differences() if "[SEP]" in line]
    tokenizer.save(tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["split_special_tokens"] is True
