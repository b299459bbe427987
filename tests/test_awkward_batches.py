"""What counts as the same caption in a batch, and the precision in which images and texts are compared."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kit.pictures import encoded, noise, picture
from kit.runs import Config, logged
from threetowers.config import InputConfig
from threetowers.data.loader import Batch, BatchReader
from threetowers.data.open import open_source
from threetowers.data.order import Order
from threetowers.data.tokenize import OpenClipTokenizer, Tokenizer, train_tokenizer
from threetowers.evaluate import evaluation
from threetowers.evaluate.encode import encode_texts
from threetowers.run.setup import autocast, prepare
from threetowers.train.loop import train

SAME = ["A Red Circle", "a red  circle", "a RED circle", "a red circle"]
CUT = ["a b c d e f g h i j k l m n o p", "a b c d e f g h i j k l m n o q"]
OTHER = ["a red circles", "a blue circle"]

TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "trained": lambda: train_tokenizer([*SAME, *CUT, *OTHER] * 3, vocab_size=300, context_length=12),
    "open_clip": lambda: OpenClipTokenizer(12),
}


def folder_of(captions: list[str], folder: Path) -> str:
    """A folder of different images, each with its caption beside it."""
    for number, caption in enumerate(captions):
        (folder / f"{number}.png").write_bytes(encoded(noise(9, 9, number), "PNG"))
        (folder / f"{number}.txt").write_text(caption)
    return str(folder)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_captions_that_are_equal_to_the_text_tower_are_equal_captions(name: str, tmp_path: Path) -> None:
    captions = [*SAME, *CUT, *OTHER]
    source = open_source(folder_of(captions, tmp_path))
    reader = BatchReader(source, Order(0, len(source), 8), TOKENIZERS[name](), InputConfig(), image=None)
    ids: dict[str, int] = {}
    batch: Batch = reader[range(8)]
    for index, caption in zip(batch.index.tolist(), batch.caption_ids.tolist(), strict=True):
        ids[source.record(index).captions[0]] = caption
    assert len({ids[" ".join(caption.split())] for caption in SAME}) == 1
    assert len({ids[caption] for caption in CUT}) == 1, "they differ behind the cut"
    assert len(set(ids.values())) == 4


def test_the_ids_of_captions_do_not_depend_on_the_rest_of_the_batch(tmp_path: Path) -> None:
    source = open_source(folder_of(["one", "a long caption of many words", "two", "three"], tmp_path))
    tokenizer = TOKENIZERS["trained"]()
    reader = BatchReader(source, Order(0, 4, 4), tokenizer, InputConfig(), image=None)
    whole = reader[range(4)]
    for place in range(4):
        assert reader[range(place, place + 1)].caption_ids.tolist() == [whole.caption_ids[place].item()]


def test_the_log_counts_them_too(tiny_config: Config, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    data = folder_of(SAME * 10, tmp_path / "data")
    config = tiny_config(data=data, method="baseline", third=(), steps=2, batch_size=8, log_every_steps=1)
    train(config, tmp_path / "run")
    assert set(logged(tmp_path / "run", "data/duplicate_captions").values()) == {7.0}


class Labelled:
    """Two labelled images; implements the part of Source that is asked for."""

    name, fingerprint, problems, templates = "labelled", "x", (), ("{}",)
    class_names = ("a red square at the top left", "the bottom right is blue")

    def __len__(self) -> int:
        return 2

    def record(self, index: int) -> object:
        from threetowers.data.source import Record

        return Record(str(index), (self.class_names[index],), index)

    def image(self, index: int) -> bytes:
        return picture(index)


@pytest.mark.parametrize("precision", ["fp32", "bf16-autocast"])
def test_classes_are_encoded_in_the_precision_of_the_images_and_captions(
    precision: str, tiny_config: Config, tmp_path: Path
) -> None:
    setup = prepare(tiny_config(method="baseline", third=(), precision=precision), tmp_path)
    source = Labelled()
    found = evaluation._labelled(setup, source)  # type: ignore[arg-type]
    as_captions = evaluation._encode(setup, source).views["txt"]  # type: ignore[arg-type]
    torch.testing.assert_close(found.classes, as_captions, rtol=0, atol=1e-6)
    plain = encode_texts(setup.model, list(source.class_names), setup.tokenizer, setup.device)
    assert torch.allclose(found.classes, plain, rtol=0, atol=1e-6) == (precision == "fp32")
    cast = autocast(setup.config, setup.device)
    again = encode_texts(setup.model, list(source.class_names), setup.tokenizer, setup.device, autocast=cast)
    torch.testing.assert_close(found.classes, again, rtol=0, atol=1e-6)
