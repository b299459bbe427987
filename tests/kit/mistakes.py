"""The folder for mistakes.py, changes to that folder and to the machine, and the command line run in it.

It holds 40 photos and their captions, two frozen towers and one that reads texts, a store, and a finished and a
stopped run.
"""

import contextlib
import io
import json
import os
import resource
import shlex
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.models import save_for_hf

from threetowers import cli
from threetowers.run import setup

NUM_PHOTOS = 40

Change = Callable[[Path], object]
"""What is done to the folder."""

Machine = Callable[[], contextlib.AbstractContextManager[object]]
"""What is different about the machine while a command runs."""


# What is done to the folder


def write(name: str, text: str) -> Change:
    def change(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    return change


def add(name: str, text: str) -> Change:
    return lambda folder: (folder / name).write_text((folder / name).read_text() + text)


def swap(name: str, old: str, new: str) -> Change:
    return lambda folder: (folder / name).write_text((folder / name).read_text().replace(old, new))


def remove(pattern: str) -> Change:
    def change(folder: Path) -> None:
        for path in sorted(folder.glob(pattern)):
            path.unlink()

    return change


def cut(pattern: str) -> Change:
    """Every matching file ends in its middle."""

    def change(folder: Path) -> None:
        for path in sorted(folder.glob(pattern)):
            os.truncate(path, path.stat().st_size // 2)

    return change


def flip(pattern: str) -> Change:
    """One bit of every matching file is another one."""

    def change(folder: Path) -> None:
        for path in sorted(folder.glob(pattern)):
            data = bytearray(path.read_bytes())
            data[-9] ^= 1
            path.write_bytes(data)

    return change


def move(old: str, new: str) -> Change:
    return lambda folder: (folder / old).rename(folder / new)


def captions_of(text: str) -> Change:
    """The table's captions are all this text."""
    rows = "".join(f"{number:02d}.jpg,{text}\n" for number in range(NUM_PHOTOS))
    return write("photos/captions.csv", f"image,caption\n{rows}")


def shard(folder: Path) -> None:
    """shards/00000.tar, cut off in its middle."""
    (folder / "shards").mkdir()
    path = folder / "shards" / "00000.tar"
    with tarfile.open(path, "w") as tar:
        for photo in sorted((folder / "photos").glob("*.jpg")):
            tar.add(photo, photo.name)
    os.truncate(path, path.stat().st_size // 2)


def as_pt(folder: Path) -> None:
    torch.save(load_file(folder / "tower" / "model.safetensors"), folder / "resnet.pt")


def coco_without_annotations(folder: Path) -> None:
    images = [{"id": number, "file_name": f"{number:02d}.jpg"} for number in range(NUM_PHOTOS)]
    (folder / "photos" / "captions.json").write_text(json.dumps({"images": images}))


# What is done to the machine


def without(module: str) -> Machine:
    """The module is not installed."""
    return lambda: mock.patch.dict("sys.modules", {module: None})


def offline() -> contextlib.AbstractContextManager[object]:
    """No network, and nothing fetched before."""
    return mock.patch.multiple("huggingface_hub.constants", HF_HUB_OFFLINE=True, HF_HUB_CACHE="nowhere")


def full_disk() -> contextlib.AbstractContextManager[object]:
    """A megabyte is free."""
    return mock.patch("shutil.disk_usage", return_value=SimpleNamespace(free=1_000_000))


@contextlib.contextmanager
def small_files() -> Iterator[None]:
    """No file may grow beyond 50 kB, as under a quota; writing further fails as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# The folder itself, and the command line in it


def make_kit(folder: Path) -> Path:
    """The folder that every mistake gets a copy of; takes seconds."""
    photos = folder / "photos"
    photos.mkdir(parents=True)
    rng, rows = np.random.default_rng(0), ["image,caption"]
    for number in range(NUM_PHOTOS):
        pixels = rng.integers(0, 255, (40, 48, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(photos / f"{number:02d}.jpg")
        rows.append(f"{number:02d}.jpg,a photo with the number {number}")
    (photos / "captions.csv").write_text("\n".join(rows) + "\n")
    for name, seed in (("tower", 1), ("other", 2)):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            save_for_hf(timm.create_model("test_resnet"), str(folder / name), safe_serialization=True)
    (folder / "run.toml").write_text(
        'preset = "tiny"\ndata = "photos/captions.csv"\nthird = "timm:local-dir:tower"\n'
        'steps = 4\nbatch_size = 8\ncheckpoint_every_steps = 2\ndevice = "cpu"\n'
        "inputs.val_fraction = 0.2\ninputs.test_fraction = 0.2\n"
    )
    text_reader(folder / "reader")
    embed = (
        "embed --tower timm:local-dir:tower --data photos/captions.csv --out store --device cpu --workers 0"
    )
    for command in ("train run.toml --out run", embed):
        answer = told(command, folder)
        assert answer.code == 0, answer.output
    shutil.copytree(folder / "run", folder / "stopped")
    for name in ("model.json", "model.safetensors", "evaluation.json"):
        (folder / "stopped" / name).unlink()
    return folder


def text_reader(folder: Path) -> None:
    """A small transformers text model with random weights, and its tokenizer."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = BertModel(BertConfig(vocab_size=len(words), **size))
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar of one file
        model.save_pretrained(folder)


class Answer(NamedTuple):
    """What a command came to. message: standard error. output: with standard output, in the order of writing."""

    code: int
    message: str
    output: str


class Both(io.StringIO):
    """Text that also goes to another stream."""

    def __init__(self, other: io.StringIO) -> None:
        super().__init__()
        self._other = other

    def write(self, text: str) -> int:
        self._other.write(text)
        return super().write(text)


def told(command: str, folder: Path) -> Answer:
    """What the command line answers in a folder."""
    setup._open_splits.cache_clear()  # the same relative path means another folder each time
    output = io.StringIO()
    message = Both(output)
    with (
        contextlib.chdir(folder),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(message),
    ):
        try:
            cli.main(shlex.split(command))
        except SystemExit as stop:
            return Answer(int(stop.code or 0), message.getvalue(), output.getvalue())
    raise AssertionError("the command line always exits")
