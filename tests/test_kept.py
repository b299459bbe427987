"""Pixels that are kept in memory: the same batches and views as without, decoded once, shared between processes."""

import multiprocessing
import os
import pickle
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from kit.batches import SPEC, reader
from kit.pictures import encoded, noise
from kit.runs import Config, assert_same_weights
from threetowers.data import loader
from threetowers.data.kept import KeptImages, KeptMemory, new_memory
from threetowers.data.loader import BatchReader, batches
from threetowers.data.open import open_source
from threetowers.data.workers import read_ahead
from threetowers.evaluate import encode as encode_module
from threetowers.run import pixels as pixels_module
from threetowers.run.pixels import Pixels, kept_images, kept_views, share_pixels
from threetowers.run.setup import Setup, prepare
from threetowers.train.loop import train, validate

NUM = 24
STEPS = 9  # three passes of 24 in batches of 8


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """24 pictures of several sizes and kinds: RGBA, grey, JPEGs of which one lies on its side."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    lines = ["image,caption"]
    for number in range(NUM):
        image = noise(20 + number, 40 - number, number)
        kind = ("png", "rgba", "grey", "jpg")[number % 4]
        name = f"{number}.{'jpg' if kind == 'jpg' else 'png'}"
        if kind == "rgba":
            image.putalpha(Image.fromarray(np.asarray(image)[:, :, 0]))
        if kind == "grey":
            image = image.convert("L")
        exif = Image.Exif()
        exif[0x0112] = 6
        options: dict[str, object] = {"exif": exif} if kind == "jpg" else {}
        (folder / name).write_bytes(encoded(image, "JPEG" if kind == "jpg" else "PNG", **options))
        lines.append(f"{name},a picture number {number}")
    (folder / "captions.csv").write_text("\n".join(lines) + "\n")
    return folder


def keeping(path: Path, memory: KeptMemory, *, workers: int = 0) -> BatchReader:
    """The reader of kit/batches.py with memory for decoded images."""
    one = reader(path, workers=workers)
    one.kept = KeptImages(memory, len(one.source))
    return one


def counted(monkeypatch: pytest.MonkeyPatch, module: object, name: str) -> list[str]:
    """The ids that a function of a module is called with from here on."""
    calls: list[str] = []
    plain: Callable[..., object] = getattr(module, name)

    def counting(data: bytes, id: str, **options: object) -> object:
        calls.append(id)
        return plain(data, id, **options)

    monkeypatch.setattr(module, name, counting)
    return calls


@pytest.mark.parametrize("capacity", [2**20, 9_000, 0], ids=["all fit", "some fit", "none fits"])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_have_the_same_bits_as_without(mixed: Path, workers: int, capacity: int) -> None:
    plain = list(batches(reader(mixed), 0, STEPS))
    kept = list(batches(keeping(mixed, KeptMemory(capacity), workers=workers), 0, STEPS))
    for one, other in zip(plain, kept, strict=True):
        assert one.pixels is not None and other.pixels is not None
        assert torch.equal(one.pixels, other.pixels) and torch.equal(one.index, other.index)


def test_every_image_is_decoded_once(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = counted(monkeypatch, loader, "decode_array")
    list(batches(keeping(mixed, KeptMemory(2**20)), 0, STEPS))
    assert len(decoded) == NUM == len(set(decoded))


def test_what_workers_decode_is_kept_for_other_processes(
    mixed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = keeping(mixed, KeptMemory(2**20), workers=2)
    list(batches(one, 0, 3))
    assert one.kept is not None and one.kept.holds(list(range(NUM)))
    decoded = counted(monkeypatch, loader, "decode_array")
    list(batches(replace_workers(one, 0), 3, STEPS))
    assert not decoded


def replace_workers(one: BatchReader, workers: int) -> BatchReader:
    one.inputs = replace(one.inputs, workers=workers)
    return one


def test_images_at_a_scale_that_depends_on_the_region_are_not_kept(mixed: Path) -> None:
    one = keeping(mixed, KeptMemory(2**20))
    one.inputs = replace(one.inputs, draft=True)
    list(batches(one, 0, 3))
    assert one.kept is not None and not one.kept.holds([0])


def test_an_image_that_cannot_be_read_is_tried_at_every_visit(mixed: Path) -> None:
    (mixed / "3.jpg").write_bytes(b"nothing")
    one = keeping(mixed, KeptMemory(2**20))
    bad = [problem.id for batch in batches(one, 0, STEPS) for problem in batch.bad]
    assert bad.count("3.jpg") >= 3


@given(st.lists(st.integers(0, 40), max_size=30), st.integers(0, 400))
def test_no_two_pieces_of_memory_overlap(sizes: list[int], capacity: int) -> None:
    memory = KeptMemory(capacity)
    taken = [(start, start + size) for size in sizes if (start := memory.take(size)) is not None]
    assert all(one[1] <= other[0] for one, other in pairwise(taken))
    assert memory.used == sum(stop - start for start, stop in taken) <= capacity


def _put(kept: KeptImages, numbers: range) -> None:
    for number in numbers:
        kept.put(number, np.full((5, number % 7 + 1, 3), number, np.uint8))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_put_at_the_same_time(method: str) -> None:
    kept = KeptImages(KeptMemory(2**16), 200)
    with ProcessPoolExecutor(4, multiprocessing.get_context(method)) as pool:
        for future in [pool.submit(_put, kept, range(k, 200, 4)) for k in range(4)]:
            future.result()
    for number in range(200):
        pixels = kept.get(number)
        assert pixels is not None and pixels.shape == (5, number % 7 + 1, 3)
        assert (pixels == number).all() and not pixels.flags.writeable


def test_a_copy_shares_the_memory() -> None:
    kept = KeptImages(KeptMemory(2**10), 3)
    copy = pickle.loads(pickle.dumps(kept))
    copy.put(1, np.ones((2, 2, 3), np.uint8))
    assert kept.get(1) is not None and kept.get(0) is None
    assert not kept.holds([0, 1]) and kept.holds([1])


def test_without_such_memory_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(name: str) -> int:
        raise OSError("not permitted")

    monkeypatch.setattr(os, "memfd_create", refused)
    assert new_memory() is None


@pytest.fixture
def own_memory(monkeypatch: pytest.MonkeyPatch) -> KeptMemory:
    """A process that keeps nothing yet."""
    memory = KeptMemory(2**22)
    monkeypatch.setattr(pixels_module, "_of_this_process", [Pixels(memory)])
    return memory


def test_a_run_has_the_same_weights_with_and_without(
    photos: Path, tiny_config: Config, tmp_path: Path, own_memory: KeptMemory
) -> None:
    config = tiny_config(method="baseline", third=(), data=str(photos), steps=12)
    train(config, tmp_path / "kept")
    assert own_memory.used
    train(replace(config, inputs=replace(config.inputs, keep_pixels=False)), tmp_path / "plain")
    assert_same_weights(tmp_path / "kept", tmp_path / "plain")


def test_runs_of_a_process_decode_once(
    photos: Path, tiny_config: Config, tmp_path: Path, own_memory: KeptMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(method="baseline", third=(), data=str(photos), steps=12)
    train(config, tmp_path / "first")
    decoded = [counted(monkeypatch, module, name) for module, name in DECODING]
    train(replace(config, seed=1), tmp_path / "second")
    assert decoded == [[], []]


DECODING = ((loader, "decode_array"), (encode_module, "decode"))


def test_a_run_that_sees_each_image_once_keeps_none(
    photos: Path, tiny_config: Config, tmp_path: Path, own_memory: KeptMemory
) -> None:
    config = tiny_config(method="baseline", third=(), data=str(photos), steps=2, batch_size=16)
    setup = prepare(config, tmp_path / "run")
    assert setup.reader().kept is None
    assert prepare(replace(config, steps=8), tmp_path / "run").reader().kept is not None


def test_views_for_evaluation_are_kept_with_the_same_figures(
    photos: Path,
    tiny_config: Config,
    tmp_path: Path,
    own_memory: KeptMemory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = tiny_config(method="baseline", third=(), data=str(photos))
    config = replace(config, inputs=replace(config.inputs, workers=2))
    setup = prepare(config, tmp_path / "run")
    without = validate(replace_keeping(setup, False))
    assert not own_memory.used
    first = validate(setup)
    decoded = counted(monkeypatch, encode_module, "decode")
    workers: list[int] = []

    def noted(*given: Any, **named: Any) -> Any:
        workers.append(given[2])
        return read_ahead(*given, **named)

    monkeypatch.setattr(encode_module, "read_ahead", noted)
    assert without == first == validate(setup) and not decoded
    assert workers == [0]  # with everything at hand no process is started


def replace_keeping(setup: Setup, keep: bool) -> Setup:
    inputs = replace(setup.config.inputs, keep_pixels=keep)
    return replace(setup, config=replace(setup.config, inputs=inputs))


def test_views_of_a_large_source_are_not_kept(photos: Path, own_memory: KeptMemory) -> None:
    source = open_source(str(photos))
    own_memory.capacity = 4 * 3 * 24**2 * len(source)
    assert kept_views(source, SPEC) is not None
    assert kept_views(source, replace(SPEC, size=25)) is None
    assert kept_images(source) is kept_images(source) and kept_views(source, SPEC) is not kept_images(source)


def test_processes_side_by_side_use_the_same_pixels(
    photos: Path, own_memory: KeptMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(str(photos))
    kept, own = kept_images(source), pixels_module.pixels()
    copy = pickle.loads(pickle.dumps(own))
    monkeypatch.setattr(pixels_module, "_of_this_process", [])
    share_pixels(copy)
    theirs = kept_images(source)
    assert kept is not None and theirs is not None and theirs is not kept
    theirs.put(3, np.full((2, 2, 3), 7, np.uint8))
    found = kept.get(3)
    assert found is not None and (found == 7).all()
