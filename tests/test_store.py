"""Stored embeddings equal live ones, are refused where they do not fit, and are complete after interruptions."""

import json
import multiprocessing
import pickle
import shutil
import signal
import time
from array import array
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from kit.files import contents
from kit.runs import Config
from kit.towers import byte_tower, image_tower
from threetowers.cli import main
from threetowers.data.decode import decode
from threetowers.data.open import open_source
from threetowers.data.source import Source, Subset
from threetowers.data.transforms import ImageSpec, cropped_view, fixed_view
from threetowers.errors import BadSample, CheckpointError, DataError, UsageError
from threetowers.run.setup import prepare
from threetowers.store.embed import find_or_make_store, store_for_training, write_store
from threetowers.store.pictures import Pictures, Task
from threetowers.store.read import FIXED, Contents, Store, Views, layout, open_store
from threetowers.towers.frozen.base import FrozenTower
from threetowers.towers.frozen.load import load_frozen

CPU = torch.device("cpu")
VIEWS = Views(3, (0.3, 0.8), (0.8, 1.2), True)


@pytest.fixture(scope="module")
def tower(timm_tower: str) -> FrozenTower:
    return image_tower(timm_tower)


@pytest.fixture(scope="module")
def source(photos: Path) -> Source:
    return open_source(str(photos))


def test_stored_features_are_the_live_ones_to_storage_rounding(
    tower: FrozenTower, source: Source, tmp_path: Path
) -> None:
    """fp16 keeps 11 bits: relative difference at most 2⁻¹¹; bf16 keeps 8."""
    pixels = [fixed_view(decode(source.image(i), ""), tower.image) for i in range(len(source))]
    live = tower(torch.from_numpy(np.stack(pixels)))
    everything = np.arange(len(source))
    store = find_or_make_store(tower, source, tmp_path / "a", CPU, batch_size=13)
    torch.testing.assert_close(store.rows(everything), live, rtol=2**-10, atol=1e-5)
    assert store.usable.all() and store.num_views == 0
    coarse = write_store(tower, source, tmp_path / "b", CPU, dtype="bf16", workers=2)
    assert coarse is not None
    torch.testing.assert_close(coarse.rows(everything), live.bfloat16().float(), rtol=2**-7, atol=1e-5)
    (folder,) = (tmp_path / "a").iterdir()
    before = contents(folder)
    assert set(before) == {"features.safetensors", "store.json", "bad_samples.jsonl"}
    again = find_or_make_store(tower, source, tmp_path / "a", CPU)
    assert torch.equal(again.rows(everything), store.rows(everything)) and contents(folder) == before
    foreign = load_file(folder / "features.safetensors")
    assert torch.equal(foreign["features"][:, 0].float(), store.rows(everything))
    assert foreign["usable"].all() and foreign["ids"].dtype == torch.uint64
    assert json.loads((folder / "store.json").read_text())["mean_square_norm"] == pytest.approx(
        float((store.rows(everything) ** 2).sum(1).mean())
    )


def test_stored_random_views_are_the_live_views_of_the_stored_crops(
    tower: FrozenTower, source: Source, tmp_path: Path
) -> None:
    store = write_store(tower, source, tmp_path / "a", CPU, views=VIEWS, batch_size=10)
    assert store is not None and store.num_views == 3
    flips = []
    for index in (0, 7, 95):
        image = decode(source.image(index), "")
        for view in range(3):
            crop = store.crop(index, view)
            flips.append(crop.flip)
            live = tower(torch.from_numpy(cropped_view(np.asarray(image), crop, tower.image).copy())[None])
            row = store.rows(np.array([index]), np.array([view]))
            torch.testing.assert_close(row, live, rtol=2**-10, atol=1e-5)
    assert len({store.crop(i, k).box for i in range(96) for k in range(3)}) == 288 and {*flips} == {
        True,
        False,
    }


def test_batches_show_the_main_tower_the_region_whose_features_they_hold(
    tiny_config: Config, tower: FrozenTower, tmp_path: Path
) -> None:
    config = tiny_config()
    inputs = replace(config.inputs, stored_views=4, crop_scale=(0.3, 0.9), flip=True)
    run = prepare(replace(config, inputs=inputs), tmp_path / "run")
    reader, spec = run.reader(), run.model.image
    store = run.thirds.stores(run.train, training=True)["third"]
    drawn: dict[int, set[int]] = {}
    for step in range(12):
        batch = reader[range(16 * step, 16 * step + 16)]
        assert batch.pixels is not None
        for row, index in enumerate(batch.index.tolist()):
            image = decode(run.train.image(index), "")
            shown = [
                np.array_equal(cropped_view(np.asarray(image), store.crop(index, k), spec), batch.pixels[row])
                for k in range(4)
            ]
            assert sum(shown) == 1
            view = shown.index(True)
            drawn.setdefault(index, set()).add(view)
            assert torch.equal(batch.third_features["third"][row], store.rows(np.array([index]), view)[0])
    assert max(map(len, drawn.values())) > 1, "another view in another epoch"
    assert run.thirds.stores(run.val)["third"].num_views == 0, "evaluation takes the fixed view"


def test_one_store_of_the_whole_data_serves_its_parts(
    tiny_config: Config, timm_tower: str, photos: Path, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as done:
        main(
            [
                "embed",
                "--tower",
                timm_tower,
                "--data",
                str(photos),
                "--out",
                str(tmp_path / "whole"),
                "--workers",
                "0",
            ]
        )
    assert done.value.code == 0
    config = tiny_config()
    whole = prepare(replace(config, embeddings=str(tmp_path / "whole")), tmp_path / "runs" / "a")
    own = prepare(config, tmp_path / "runs" / "b")
    for part in ("train", "val", "test"):
        a, b = (run.thirds.stores(getattr(run, part))["third"] for run in (whole, own))
        assert torch.equal(a.rows(np.arange(len(a))), b.rows(np.arange(len(b))))
    assert a.contents.num_samples == 96 > b.contents.num_samples
    assert torch.equal(whole.model.third_norms, own.model.third_norms)
    assert not (tmp_path / "runs" / "embeddings").exists(), "nothing was embedded beside the named store"
    copied = pickle.loads(pickle.dumps(a))
    assert len(pickle.dumps(a)) < 3_000 and torch.equal(
        copied.rows(np.array([3, 1])), a.rows(np.array([3, 1]))
    )


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 39), max_size=60), st.data())
def test_rows_come_back_in_the_order_asked_for(samples: list[int], data: st.DataObject) -> None:
    contents = Contents("x", "image", 5, "fp32", Views(2), 40, 80)
    store = Store.__new__(Store)
    values = np.arange(400, dtype=np.float32).reshape(80, 5)
    store.contents, store.select, store._features = contents, np.arange(40)[::-1].copy(), values
    which = data.draw(st.lists(st.integers(0, 1), min_size=len(samples), max_size=len(samples)))
    rows = store.rows(np.array(samples, dtype=np.int64), np.array(which, dtype=np.int64))
    expected = [values[2 * (39 - s) + k] for s, k in zip(samples, which, strict=True)]
    assert np.array_equal(rows.numpy(), np.array(expected, dtype=np.float32).reshape(-1, 5))


def test_what_does_not_fit_is_refused_by_name(
    tower: FrozenTower, source: Source, timm_tower: str, tmp_path: Path
) -> None:
    prints = tower.fingerprints()
    write_store(tower, source, tmp_path / "a", CPU)

    def refusal(*arguments: object) -> str:
        with pytest.raises(UsageError) as error:
            store_for_training(tmp_path / "a", *arguments)  # type: ignore[arg-type]
        return str(error.value)

    changed = tmp_path / "changed"
    shutil.copytree(timm_tower.removeprefix("timm:local-dir:"), changed)
    weights = bytearray((changed / "model.safetensors").read_bytes())
    weights[-1_000] ^= 1
    (changed / "model.safetensors").write_bytes(weights)
    other = load_frozen(f"timm:local-dir:{changed}")
    assert isinstance(other, FrozenTower)
    assert "weights differ" in refusal(other, other.fingerprints(), source, FIXED)
    resized = replace(tower, inputs=replace(tower.image, size=40))
    text = refusal(resized, resized.fingerprints(), source, FIXED)
    assert "preprocessing differ" in text and "weights" not in text and "threetowers embed" in text
    assert "features differ" in refusal(tower, {**prints, "features": "cls"}, source, FIXED)
    assert "views differ (one fixed view stored, 3 random views" in refusal(tower, prints, source, VIEWS)
    part = Subset(source, array("q", range(50)), "part")
    elsewhere = open_source(str(_other_table(tmp_path)))
    assert "data differ" in refusal(tower, prints, elsewhere, FIXED)
    assert len(store_for_training(tmp_path / "a", tower, prints, part, FIXED)) == 50
    with pytest.raises(UsageError, match="weights differ"):
        write_store(other, source, tmp_path / "a", CPU)


def _other_table(folder: Path) -> Path:
    image = Image.new("RGB", (20, 20))
    image.save(folder / "x.png")
    (folder / "t.csv").write_text("path,caption\nx.png,one\n", encoding="utf-8")
    return folder / "t.csv"


@pytest.mark.parametrize("damage", ["cut", "longer", "flipped", "header", "json", "schema", "number", "gone"])
def test_a_damaged_store_is_an_error_of_one_line(
    damage: str, tower: FrozenTower, source: Source, tmp_path: Path
) -> None:
    write_store(tower, source, tmp_path / "a", CPU)
    path, described = tmp_path / "a" / "features.safetensors", tmp_path / "a" / "store.json"
    data, text = bytearray(path.read_bytes()), described.read_text()
    if damage == "flipped":
        data[len(data) // 2] ^= 4
    if damage == "header":
        data[20] ^= 1
    changed = {"cut": data[:-1], "longer": data + b"x"}.get(damage, data)
    path.write_bytes(changed)
    texts = {
        "json": text[:40],
        "schema": text.replace('"schema": 1', '"schema": 9'),
        "number": text.replace('"num_samples": 96', '"num_samples": "many"'),
    }
    described.write_text(texts.get(damage, text))
    if damage == "gone":
        path.unlink()
    with pytest.raises(CheckpointError) as error:
        store_for_training(tmp_path / "a", tower, tower.fingerprints(), source, FIXED)
    assert "\n" not in str(error.value) and "embed again" in str(error.value)


class Faulty:
    """A source some of whose images fail: `always`, or at the first read only."""

    def __init__(self, source: Source, always: set[int], once: set[int]) -> None:
        self._source, self.always, self.once = source, always, set(once)

    def __len__(self) -> int:
        return len(self._source)

    def __getattr__(self, name: str) -> object:
        return getattr(self.__dict__["_source"], name)

    def image(self, index: int) -> bytes:
        if index in self.once:
            self.once.remove(index)
            raise BadSample("x", "unreadable")
        return b"" if index in self.always else self._source.image(index)


class Slow(Faulty):
    """A source whose images take their time."""

    def image(self, index: int) -> bytes:
        time.sleep(0.01)
        return self._source.image(index)


def test_killed_and_continued_or_shared_it_gives_the_same_bytes(
    tower: FrozenTower, source: Source, tmp_path: Path
) -> None:
    def write(name: str, **more: object) -> Store | None:
        return write_store(tower, source, tmp_path / name, CPU, views=VIEWS, chunk=24, batch_size=27, **more)  # type: ignore[arg-type]

    whole = write("whole")
    assert whole is not None
    process = multiprocessing.get_context("fork").Process(  # whose imports are done
        target=write_store,
        args=(tower, Slow(source, set(), set()), tmp_path / "killed", CPU),
        kwargs={"views": VIEWS, "chunk": 24, "batch_size": 27},
    )
    process.start()
    markers = tmp_path / ".killed.fp16.partial" / "chunks"
    while process.is_alive() and len(list(markers.glob("0*.json"))) < 1:
        time.sleep(0.005)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    done = {path.name: path.stat().st_mtime_ns for path in markers.glob("0*.json")}
    assert 1 <= len(done) < 4 and not (tmp_path / "killed").exists()
    # whatever a kill leaves of an unfinished chunk is written over
    file = tmp_path / ".killed.fp16.partial" / "features.safetensors"
    slot = layout(whole.contents).slots["features"]
    with file.open("r+b") as stream:
        stream.seek(slot.offset + slot.size - 500)
        stream.write(b"torn" * 100)
    assert write("killed") is not None
    assert write("shared", part=(1, 2)) is None and not (tmp_path / "shared").exists()
    assert write("shared", part=(0, 2)) is not None
    for name in ("killed", "shared"):
        assert contents(tmp_path / name) == contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "shared", "whole"]


def test_unfinished_work_on_something_else_is_not_continued(
    tower: FrozenTower, source: Source, tmp_path: Path
) -> None:
    write_store(tower, source, tmp_path / "a", CPU, chunk=8, part=(0, 2))
    with pytest.raises(UsageError, match="unfinished work on other embeddings \\(views"):
        write_store(tower, source, tmp_path / "a", CPU, chunk=8, views=VIEWS)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds something else"):
        write_store(tower, source, tmp_path / "b", CPU)


def test_an_image_is_read_twice_before_it_is_listed_as_unusable(
    tower: FrozenTower, source: Source, tmp_path: Path
) -> None:
    faulty = Faulty(source, always={5, 40}, once={6, 41})
    store = write_store(tower, faulty, tmp_path / "a", CPU, chunk=16, batch_size=5)  # type: ignore[arg-type]
    good = write_store(tower, source, tmp_path / "b", CPU, chunk=16, batch_size=5)
    assert store is not None and good is not None
    assert np.flatnonzero(~store.usable).tolist() == [5, 40]
    listed = [json.loads(line) for line in (tmp_path / "a" / "bad_samples.jsonl").read_text().splitlines()]
    assert [(each["id"], each["reason"]) for each in listed] == [
        (source.record(index).id, "empty file") for index in (5, 40)
    ]
    rest = np.flatnonzero(store.usable)
    torch.testing.assert_close(store.rows(rest), good.rows(rest), rtol=2**-9, atol=1e-4)
    assert store.mean_square_norm() == pytest.approx(float((store.rows(rest) ** 2).sum(1).mean()))
    with pytest.raises(DataError, match="not one of 96 samples"):
        write_store(tower, Faulty(source, set(range(96)), set()), tmp_path / "c", CPU)  # type: ignore[arg-type]


class Loud(nn.Module):
    """Features of which the last images' exceed fp16."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.register_buffer("factor", torch.tensor(factor))

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3)).abs() * self.factor  # type: ignore[operator]


def test_features_beyond_fp16_are_stored_in_fp32_and_infinite_ones_are_refused(
    tower: FrozenTower, source: Source, tmp_path: Path
) -> None:
    loud = replace(tower, module=Loud(1e5), width=3)
    store = write_store(loud, source, tmp_path / "a", CPU, chunk=16)
    assert store is not None and store.contents.dtype == "fp32"
    assert torch.isfinite(store.rows(np.arange(96))).all() and [p.name for p in tmp_path.iterdir()] == ["a"]
    with pytest.raises(DataError, match="not finite"):
        write_store(replace(tower, module=Loud(float("inf")), width=3), source, tmp_path / "b", CPU)


def test_a_text_tower_is_stored_by_caption_and_drawn_with_it(source: Source, tmp_path: Path) -> None:
    tower = byte_tower()
    store = write_store(tower, source, tmp_path / "a", CPU, chunk=7, batch_size=5)
    assert store is not None and store.side == "text" and store.contents.num_rows == 192
    for index in (0, 50, 95):
        for place, caption in enumerate(source.record(index).captions):
            live = tower(tower.tokenizer([caption]))
            torch.testing.assert_close(store.rows(np.array([index]), place), live, rtol=2**-10, atol=1e-3)
    some = store.part(np.array([3, 9]))
    expected = torch.cat([store.rows(np.array([i, i]), np.array([0, 1])) for i in (3, 9)])
    assert some.mean_square_norm() == pytest.approx(float((expected**2).sum(1).mean()), rel=1e-6)


def test_a_text_side_third_tower_trains_and_combines_with_captions(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from threetowers.evaluate.evaluation import evaluate_run
    from threetowers.run import thirds as thirds_module
    from threetowers.train.loop import train

    monkeypatch.setattr(thirds_module, "load_frozen", byte_tower)
    config = tiny_config(third=("hf-text:tiny",), steps=4)
    assert train(config, tmp_path / "run").finished
    run = prepare(config, tmp_path / "run")
    batch = run.reader()[range(16)]
    tower = byte_tower()
    for row, (index, tokens) in enumerate(zip(batch.index.tolist(), batch.tokens, strict=True)):
        captions = run.train.record(index).captions
        seen = [c for c in captions if torch.equal(_tokens(run.tokenizer, c, len(tokens)), tokens)]
        live = tower(tower.tokenizer(seen[:1]))
        torch.testing.assert_close(batch.third_features["third"][row : row + 1], live, rtol=2**-10, atol=1e-3)
    result = evaluate_run(tmp_path / "run")
    features = load_file(tmp_path / "run" / "features.safetensors")
    num_texts = len(features["test/text_image"])
    assert (
        len(features["test/third@img"]) == len(features["test/txt@third"]) == num_texts == 2 * result.num_test
    )
    assert len(features["test/img@third"]) == result.num_test
    sweep = result.sections["combination"]["third"]
    scores = features["test/img@third"] @ features["test/third@img"].T
    assert (
        scores.shape == (result.num_test, num_texts)
        and sweep["ends"][0] == result.sections["test"]["mean_r@1"]
    )
    from threetowers.evaluate.retrieval import ranks_from_features, recalls

    alone = ranks_from_features(
        features["test/img@third"],
        features["test/third@img"],
        features["test/text_image"],
        features["test/text_group"],
    )
    assert sweep["ends"][1] == recalls(alone)["mean_r@1"]


def _tokens(tokenizer: Callable[[list[str]], Tensor], caption: str, width: int) -> Tensor:
    return tokenizer([caption])[0, :width]


def test_stored_views_and_live_views_exclude_each_other(tiny_config: Config, tmp_path: Path) -> None:
    config = tiny_config()
    inputs = replace(config.inputs, stored_views=2, third_view="same")
    with pytest.raises(UsageError, match=r"inputs\.stored_views"):
        prepare(replace(config, inputs=inputs), tmp_path / "run")


@pytest.mark.parametrize("part", ["2/2", "1", "a/b", "-1/2", "0/0"])
def test_a_part_that_is_none_is_refused(part: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["embed", "--tower", "x", "--data", "y", "--out", "z", f"--part={part}"])
    assert stopped.value.code == 2 and "--part" in capsys.readouterr().err


def test_open_store_reads_what_was_written(tower: FrozenTower, source: Source, tmp_path: Path) -> None:
    written = write_store(tower, source, tmp_path / "a", CPU, views=VIEWS)
    found = open_store(tmp_path / "a", thorough=True)
    assert written is not None and found.contents == written.contents
    assert torch.equal(found.rows(np.arange(96), 2), written.rows(np.arange(96), 2))
    assert "3 random views" in found.summary()


@pytest.mark.parametrize("num_views", [0, 2])
def test_threads_read_the_same_views_in_the_same_order(photos: Path, tmp_path: Path, num_views: int) -> None:
    folder = tmp_path / "photos"
    shutil.copytree(photos.parent, folder)
    source = open_source(str(folder / photos.name))
    broken = source.record(5).id
    (folder / broken).write_bytes(b"no picture")
    views = Views(num_views, (0.3, 1.0), (0.75, 1.3), True) if num_views else FIXED
    spec = ImageSpec(24, (0.5,) * 3, (0.5,) * 3)
    task = Task(0, range(40), True)
    _, alone = Pictures(source, spec, views, None)[task]
    with ThreadPoolExecutor(4) as pool:
        _, shared = Pictures(source, spec, views, pool)[task]
    assert shared.kept == alone.kept == [index for index in range(40) if index != 5]
    assert torch.equal(shared.pixels, alone.pixels) and np.array_equal(shared.crops, alone.crops)
    assert [bad.id for bad in shared.bad] == [bad.id for bad in alone.bad] == [broken]


def test_an_image_is_read_again_when_reading_failed_once(photos: Path) -> None:
    source = open_source(str(photos))
    failures = iter([True, False])
    plain = source.image

    def failing_once(index: int) -> bytes:
        if index == 3 and next(failures):
            raise BadSample(source.record(3).id, "unreadable")
        return plain(index)

    with mock.patch.object(source, "image", failing_once):
        spec = ImageSpec(24, (0.5,) * 3, (0.5,) * 3)
        _, read = Pictures(source, spec, FIXED, None)[Task(0, range(8), True)]
    assert read.kept == list(range(8)) and not read.bad
