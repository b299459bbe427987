"""Tokenizers: start, end and padding, saved vocabularies, and defects that are named."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import get_clean_fn

from threetowers.data.tokenize import OpenClipTokenizer, clean, load_tokenizer, train_tokenizer
from threetowers.errors import UsageError

CAPTIONS = [
    "a red circle left of a blue star",
    "ein großes Haus am Fluß",
    "赤い丸と青い星",
    "a red circle",
] * 5
TOKENIZER = train_tokenizer(CAPTIONS, vocab_size=400, context_length=24)


@given(st.lists(st.text(max_size=60), min_size=1, max_size=5))
@settings(deadline=None, max_examples=50)
def test_any_text_has_one_start_one_end_and_padding_behind(texts: list[str]) -> None:
    tokens = TOKENIZER(texts)
    lengths = TOKENIZER.lengths(tokens)
    assert tokens.shape == (len(texts), 24)
    for row, length in zip(tokens.tolist(), lengths.tolist(), strict=True):
        assert row[0] == 1 and row[length - 1] == 2 and row.count(2) == 1
        assert all(token == 0 for token in row[length:]) and 0 not in row[:length]


def test_a_saved_tokenizer_gives_the_same_ids_again(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path)
    for name in (str(tmp_path), str(tmp_path / "tokenizer.json")):
        again = load_tokenizer(name, 24)
        assert torch.equal(again(CAPTIONS), TOKENIZER(CAPTIONS))
        assert torch.equal(again.lengths(again(CAPTIONS)), TOKENIZER.lengths(TOKENIZER(CAPTIONS)))
        assert again.text_cfg() == TOKENIZER.text_cfg()
    shorter = load_tokenizer(str(tmp_path), 5)
    assert (shorter(["a red circle left of a blue star"])[0, -1] == 2).item(), (
        "the end token survives the cut"
    )


def test_a_save_that_is_cut_short_leaves_no_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(path: Path, target: Path) -> None:
        raise InterruptedError(f"before {target.name} has its name")

    tokenizer = train_tokenizer(["a b"], vocab_size=300, context_length=8)
    monkeypatch.setattr(Path, "replace", stopped)
    with pytest.raises(InterruptedError):
        tokenizer.save(tmp_path)
    assert not list(tmp_path.iterdir()), "a run that goes on would read it"


def test_training_learns_the_words_and_is_repeatable() -> None:
    assert TOKENIZER.lengths(TOKENIZER(["a red circle"])).item() == 5, "start, three words, end"
    again = train_tokenizer(CAPTIONS, vocab_size=400, context_length=24)
    assert torch.equal(again(CAPTIONS), TOKENIZER(CAPTIONS))


def test_clips_vocabulary_keeps_its_end_token() -> None:
    tokenizer = OpenClipTokenizer(16)
    tokens = tokenizer(["a cat", "word " * 40])
    assert tokenizer.lengths(tokens).tolist() == [4, 16]
    assert tokens[0, 3] == tokens[1, 15] == tokenizer.text_cfg()["vocab_size"] - 1


def test_defects_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"pair\.tokenizer"):
        load_tokenizer(str(tmp_path / "nowhere.json"), 8)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UsageError, match=r"tokenizer\.json"):
        load_tokenizer(str(tmp_path), 8)


@given(st.text(max_size=40) | st.text(st.characters(max_codepoint=127), max_size=40))
@settings(max_examples=300, deadline=None)
def test_cleaning_is_open_clips(text: str) -> None:
    assert clean(text) == get_clean_fn("whitespace")(text)


def test_a_foreign_tokenizer_with_markers_of_its_own(tmp_path: Path) -> None:
    """A BERT-like WordPiece: [CLS] … [SEP], padded with [PAD]; open_clip reads the saved folder to the same ids."""
    from open_clip.tokenizer import HFTokenizer
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "circle", "##s", "star"]
    wordpiece = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    wordpiece.normalizer = normalizers.BertNormalizer()
    wordpiece.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    wordpiece.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    (tmp_path / "given").mkdir()
    wordpiece.save(str(tmp_path / "given" / "tokenizer.json"))
    ours = load_tokenizer(str(tmp_path / "given"), 8)
    texts = ["A red circle", "red circles & stars " * 5, ""]
    assert ours(texts)[0].tolist() == [2, 4, 5, 6, 3, 0, 0, 0]
    assert ours.lengths(ours(texts)).tolist() == [5, 8, 2]
    assert ours.text_cfg()["eos_id"] == 3 and ours.text_cfg()["pad_id"] == 0
    ours.save(tmp_path)
    assert torch.equal(HFTokenizer(str(tmp_path), context_length=8)(texts), ours(texts))
    wordpiece.post_processor = processors.Sequence([])
    wordpiece.save(str(tmp_path / "given" / "tokenizer.json"))
    with pytest.raises(UsageError, match="end token"):
        load_tokenizer(str(tmp_path / "given"), 8)


@pytest.mark.parametrize("name", ["open_clip", "trained"])
def test_what_is_cut_and_what_the_tower_sees(name: str) -> None:
    if name == "open_clip":
        tokenizer = load_tokenizer("open_clip", 8)
        whole, cut = "a b c d e f", "a b c d e f g"
    else:
        tokenizer = train_tokenizer(["a b c d e f g h"] * 9, vocab_size=300, context_length=8)
        whole, cut = "a b c d e f", "a b c d e f g"
    assert tokenizer.is_cut([whole, cut, ""]) == [False, True, False]
    tokens = tokenizer([whole, cut])
    for row, length in zip(tokens, tokenizer.lengths(tokens), strict=True):
        seen = tokenizer.decode(row[:length].tolist())
        assert "a b c d e f" in seen
        assert "g" not in seen
        assert seen.startswith("<start")
        assert seen.endswith(">")
