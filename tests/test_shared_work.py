"""What the processes of a run do together beside its steps, embeddings and suites, is what one process does."""

import errno
import os
import shutil
import signal
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from kit.files import contents
from kit.processes import Processes as Group
from kit.processes import processes as group_of
from kit.runs import Config, logged
from kit.towers import byte_tower, image_tower
from threetowers.config import RunConfig
from threetowers.data.open import open_source
from threetowers.data.source import Subset
from threetowers.errors import CheckpointError, LostProcessError
from threetowers.evaluate import encode
from threetowers.evaluate.suite.live import open_watched, suite_metrics
from threetowers.processes import ALONE, Processes
from threetowers.run.setup import prepare
from threetowers.store import embed
from threetowers.store.embed import find_or_make_store, write_store
from threetowers.store.read import FIXED, Views
from threetowers.store.write import Work, even_chunk
from threetowers.train.loop import train

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Group]:
    with group_of(2, tmp_path_factory.mktemp("group")) as started:
        yield started


@pytest.fixture(scope="module")
def damaged(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The photos, of which three cannot be read; one is among the first five."""
    folder = tmp_path_factory.mktemp("damaged") / "photos"
    shutil.copytree(photos.parent, folder)
    for number in (3, 30, 95):
        (folder / f"{number:03d}.png").write_bytes(b"no image")
    return str(folder / photos.name)


def own() -> Processes:
    """The processes of the group that this one is of, or this one alone."""
    return Processes(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else ALONE


class Case(NamedTuple):
    """How many samples are stored, their views, and the samples of a chunk at most."""

    samples: int
    views: Views = FIXED
    chunk: int = 4_096

    @property
    def name(self) -> str:
        return f"{self.samples}-{self.views.num}-{self.chunk}"


CASES = (
    Case(96),
    Case(96, chunk=24),
    Case(37, chunk=16),
    Case(33),
    Case(20, Views(3, (0.3, 0.8), (0.8, 1.2), True)),
    Case(5),
    Case(1),
)


def stored(spec: str, data: str, folder: Path, cases: Sequence[Case] = CASES) -> list[int]:
    """Stores the first samples of the data in each case; how many images this process has embedded for each."""
    tower, source, compute = image_tower(spec), open_source(data), embed._features
    computed: list[int] = []

    def features(tower: Any, pixels: Any, device: Any) -> Any:
        computed[-1] += len(pixels)
        return compute(tower, pixels, device)

    with mock.patch.object(embed, "_features", features):
        for case in cases:
            computed.append(0)
            part = Subset(source, array("q", range(case.samples)), "the first")
            store = write_store(
                tower, part, folder / case.name, CPU, views=case.views, chunk=case.chunk, processes=own()
            )
            assert store is not None and len(store) == case.samples
    return computed


def test_a_store_that_processes_make_together_is_that_of_one_to_the_byte(
    group: Group, timm_tower: str, damaged: str, tmp_path: Path
) -> None:
    """Of odd sizes, of fewer samples than processes, and with images that cannot be read."""
    whole = stored(timm_tower, damaged, tmp_path / "one")
    first, second = group.run(stored, timm_tower, damaged, tmp_path / "two")
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert len(list((tmp_path / "two").iterdir())) == len(CASES), "nothing unfinished is left"
    assert [a + b for a, b in zip(first, second, strict=True)] == whole == [93, 93, 35, 31, 19, 4, 1]
    assert all(second[:5]) and max(first) < 60, "each computes its share"
    assert group.run(stored, timm_tower, damaged, tmp_path / "two") == [[0] * len(CASES)] * 2


def texts_stored(data: str, folder: Path) -> None:
    source = Subset(open_source(data), array("q", range(37)), "the first")
    assert write_store(byte_tower(), source, folder, CPU, processes=own()) is not None


def test_captions_are_embedded_together(group: Group, damaged: str, tmp_path: Path) -> None:
    texts_stored(damaged, tmp_path / "one")
    group.run(texts_stored, damaged, tmp_path / "two")
    one, two = (load_file(tmp_path / name / "features.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for key, value in one.items():
        # batches of other captions are padded otherwise, and summed up in another order
        torch.testing.assert_close(two[key], value, rtol=2**-10 if key == "features" else 0, atol=0)


def stored_wide(spec: str, data: str, folder: Path, wide: int) -> list[int]:
    """A store where this rank alone finds a feature that fp16 cannot hold."""
    limit = 0.0 if own().rank == wide else embed.FP16_LIMIT
    with mock.patch.object(embed, "FP16_LIMIT", limit):
        return stored(spec, data, folder, [Case(37)])


@pytest.mark.parametrize("wide", [0, 1])
def test_where_fp16_cannot_hold_a_feature_of_one_process_all_store_fp32(
    wide: int, group: Group, timm_tower: str, damaged: str, tmp_path: Path
) -> None:
    """The first has more samples here, so that the other is done before it is told."""
    with mock.patch.object(embed, "FP16_LIMIT", 0.0):
        stored(timm_tower, damaged, tmp_path / "one", [Case(37)])
    group.run(stored_wide, timm_tower, damaged, tmp_path / "two", wide)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_work_that_another_number_of_processes_has_begun_is_continued(
    group: Group, timm_tower: str, damaged: str, tmp_path: Path
) -> None:
    stored(timm_tower, damaged, tmp_path / "one", [Case(96)])
    tower, source = image_tower(timm_tower), open_source(damaged)
    part = Subset(source, array("q", range(96)), "the first")
    left = tmp_path / "two" / Case(96).name
    assert write_store(tower, part, left, CPU, part=(1, 3), chunk=16) is None
    first, second = group.run(stored, timm_tower, damaged, tmp_path / "two", [Case(96)])
    assert first[0] + second[0] == 93 - 31 and first[0] and second[0]
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def found(spec: str, data: str, folder: Path, other: str) -> str:
    """The folder of a store that is found or made, or the error; other: the features that rank 1 asks for."""
    tower = image_tower(spec)
    if own().rank:
        tower = replace(tower, features=other)
    try:
        with mock.patch.object(embed, "_fill", side_effect=AssertionError("embedded again")):
            return str(find_or_make_store(tower, open_source(data), folder, CPU, processes=own()).folder)
    except CheckpointError as error:
        return str(error)


def test_a_store_that_is_there_is_found_by_all(
    group: Group, timm_tower: str, damaged: str, tmp_path: Path
) -> None:
    tower, source = image_tower(timm_tower), open_source(damaged)
    there = write_store(tower, source, tmp_path / "of another name", CPU)
    assert there is not None
    assert group.run(found, timm_tower, damaged, tmp_path, tower.features) == [str(there.folder)] * 2
    for text in group.run(found, timm_tower, damaged, tmp_path, "other"):
        assert text.startswith("rank 1 has other weights or settings of 'timm:") and "than rank 0" in text


def full_disk(spec: str, data: str, folder: Path) -> tuple[int | None, str | None]:
    """The error where rank 1 alone cannot write."""

    def write(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "features.safetensors")

    with mock.patch.object(Work, "write", write if own().rank else Work.write):
        try:
            stored(spec, data, folder, [Case(33)])
        except OSError as error:
            return error.errno, error.filename
    return None, None


def test_a_disk_that_is_full_for_one_ends_all_and_the_next_call_goes_on(
    group: Group, timm_tower: str, damaged: str, tmp_path: Path
) -> None:
    told = group.run(full_disk, timm_tower, damaged, tmp_path / "two")
    assert told == [(errno.ENOSPC, "features.safetensors")] * 2
    first, second = group.run(stored, timm_tower, damaged, tmp_path / "two", [Case(33)])
    assert first == [0] and second == [1], "what rank 0 has written is not computed again"


def trained(config: RunConfig, folder: Path, killed: bool) -> str:
    """A run in a process of a group; what it says at its end. killed: rank 1, before it writes what it has embedded."""

    def write(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    rank, size = dist.get_rank(), dist.get_world_size()
    with mock.patch.object(Work, "write", write if killed and rank else Work.write):
        try:
            return f"step {train(config, folder, processes=Processes(rank, size, rank, size)).step}"
        except LostProcessError as error:
            folder.with_suffix(".said").write_text(str(error), encoding="utf-8")
            raise


def test_a_process_is_killed_while_it_embeds_and_the_same_command_makes_the_store_of_one(
    group: Group, tiny_config: Config, tmp_path: Path
) -> None:
    config = tiny_config()
    train(config, tmp_path / "one")
    again = replace(config, embeddings=str(tmp_path / "again"))
    with pytest.raises((EOFError, AssertionError)), group_of(2, tmp_path) as dying:
        dying.run(trained, again, tmp_path / "two", True)
    assert "another process of this run has ended" in (tmp_path / "two.said").read_text(encoding="utf-8")
    (left,) = (tmp_path / "again").iterdir()
    assert [path.name for path in (left / "chunks").iterdir()] == ["000000.json"]
    assert group.run(trained, again, tmp_path / "two", False) == ["step 6"] * 2
    assert contents(tmp_path / "again") == contents(tmp_path / "embeddings")
    assert logged(tmp_path / "two") == pytest.approx(logged(tmp_path / "one"), rel=1e-5)


@given(st.integers(0, 100_000), st.integers(1, 64), st.sampled_from([16, 4_096]))
def test_chunks_are_shared_evenly(samples: int, processes: int, most: int) -> None:
    """No process has more than its share, but for what a chunk of full pieces takes more."""
    chunk = even_chunk(samples, processes, most, 16)
    assert 16 <= chunk <= most and chunk % 16 == 0
    sizes = np.diff([*range(0, samples, chunk), samples])
    rounds = -(-len(sizes) // processes)
    shares = [int(sizes[rank::processes].sum()) for rank in range(processes)]
    assert sum(shares) == samples and max(shares) <= samples / processes + 16 * rounds


@pytest.fixture
def suite(damaged: str, tmp_path: Path) -> str:
    """Captioned images, and labelled ones to classify; some cannot be read."""
    for number, path in enumerate(sorted(Path(damaged).parent.glob("*.png"))[:47]):
        folder = tmp_path / "classes" / f"class {number % 5}"
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder)
    path = tmp_path / "suite.toml"
    path.write_text(
        f'[[data]]\nname = "photos"\npath = "{damaged}"\n\n'
        f'[[data]]\nname = "classes"\npath = "{tmp_path / "classes"}"\n'
    )
    return str(path)


def measured(config: RunConfig, folder: Path, suite: str) -> tuple[dict[str, float], int]:
    """The metrics of a suite on a model that has not been trained, and how many images this process has read."""
    setup = prepare(config, folder, saved_tokenizer=folder, processes=own())
    read, get = [0], encode._FixedViews.__getitem__

    def counted(views: Any, indices: list[int]) -> Any:
        read[0] += len(indices)
        return get(views, indices)

    with mock.patch.object(encode._FixedViews, "__getitem__", counted):
        return suite_metrics(setup, open_watched(suite, 0), own()), read[0]


@pytest.mark.parametrize("method", ["baseline", "lit"])
def test_processes_measure_a_suite_as_one_does(
    method: Any, group: Group, suite: str, tiny_config: Config, tmp_path: Path
) -> None:
    """LiT asks for stores of the images, and the baseline reads them."""
    config = tiny_config(method=method)
    expected, whole = measured(config, tmp_path / "one", suite)
    assert {key.rpartition("/")[0] for key in expected} >= {"retrieval/photos", "zero_shot/classes"}
    config = replace(config, embeddings=str(tmp_path / "again"))
    (first, one), (second, other) = group.run(measured, config, tmp_path / "two", suite)
    assert first == second == pytest.approx(expected, abs=1e-6)
    assert one + other == whole
    assert method == "lit" or (whole == 96 + 47 and abs(one - other) <= 3), "each reads its share"


def test_a_suite_chooses_the_same_weights_in_two_processes(
    group: Group, suite: str, tiny_config: Config, tmp_path: Path
) -> None:
    config = tiny_config(
        suite=suite, suite_images=40, eval_every_steps=2, keep_best="retrieval/photos/t2i_r@10"
    )
    train(config, tmp_path / "one")
    assert group.run(trained, config, tmp_path / "two", False) == ["step 6"] * 2
    for key in ("retrieval/photos/t2i_r@10", "zero_shot/classes/top1"):
        values = logged(tmp_path / "one", key)
        assert list(values) == [2, 4, 6] and logged(tmp_path / "two", key) == pytest.approx(values, abs=1e-6)
