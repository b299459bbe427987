"""The index of shards is made once, mapped afterwards, and refused when it is not what was written."""

import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from kit.sources import content
from threetowers.data.open import split
from threetowers.data.order import hash64
from threetowers.data.shards import columns as columns_module
from threetowers.data.shards import index, indexing
from threetowers.data.shards.columns import Column, Columns, pack_columns
from threetowers.data.shards.groups import Reading, TarGroups, read_groups
from threetowers.data.shards.index import Shard
from threetowers.data.shards.source import open_shards
from threetowers.data.shards.write import ShardSample, write_shards
from threetowers.data.source import Subset
from threetowers.errors import BadSample, DataError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("THREETOWERS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "index"


def samples(count: int, tag: str = "") -> list[ShardSample]:
    return [
        ShardSample(f"{i:06d}", f"image {i}{tag}".encode(), "png", (f"caption {i}{tag}", "second"))
        for i in range(count)
    ]


def shards(folder: Path, count: int = 7, size: int = 3, tag: str = "") -> Path:
    """Shards of an hour ago, so that their indexes are stored."""
    for path in write_shards(folder, samples(count, tag), shard_size=size):
        age(path)
    return folder


def age(path: Path, seconds: float = 3600) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


def walks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the shards that are walked from here on."""
    names: list[str] = []
    real = read_groups

    def counted(name: str, file: int, stem: str) -> TarGroups:
        names.append(stem)
        return real(name, file, stem)

    monkeypatch.setattr(index, "read_groups", counted)
    return names


# --- columns


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=9), max_size=4),
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), max_size=9),
    st.integers(8, 64),
)
def test_columns_round_trip_in_any_parts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, parts: list[list[int]], texts: list[str], chunk: int
) -> None:
    monkeypatch.setattr(columns_module, "CHUNK", chunk // 8 * 8)
    data = [text.encode() for text in texts]
    given_columns = {
        "t": Column("U8", sum(map(len, data)), [np.frombuffer(b"".join(data), np.uint8)]),
        "n": Column("I64", sum(map(len, parts)), [np.array(part, np.int64) for part in parts]),
        "t_ends": Column("I64", len(data), [np.cumsum([len(text) for text in data], dtype=np.int64)]),
    }
    raw = pack_columns("about", given_columns)
    (tmp_path / "f").write_bytes(raw)
    whole = [number for part in parts for number in part]
    for place in (raw, tmp_path / "f"):
        found = pickle.loads(pickle.dumps(Columns(place, "about")))
        assert found.array("n").tolist() == whole == [found.number("n", i) for i in range(len(whole))]
        assert [found.text("t", i) for i in range(len(texts))] == texts
        with pytest.raises(IndexError):
            found.text("t", len(texts))
    with pytest.raises(DataError, match="about other data"):
        Columns(raw, "another")
    if whole:
        with safe_open(tmp_path / "f", "np") as file:  # the layout is safetensors' own
            assert file.get_tensor("n").tolist() == whole


@pytest.mark.parametrize("whole", [True, False])
def test_no_damaged_byte_is_believed(whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At opening, or, in a file too large for that, at the first use of what is damaged."""
    monkeypatch.setattr(columns_module, "CHUNK", 64)
    if not whole:
        monkeypatch.setattr(columns_module, "CHECKED_AT_OPENING", 0)
    numbers = np.arange(40, dtype=np.int64) * 7
    raw = pack_columns("k", {"n": Column("I64", 40, [numbers])})
    generator = random.Random(0)
    for _ in range(400):
        damaged = bytearray(raw)
        match generator.randrange(3):
            case 0:
                damaged[generator.randrange(len(raw))] ^= 1 << generator.randrange(8)
            case 1:
                del damaged[generator.randrange(len(raw)) :]
            case 2:
                damaged += generator.randbytes(generator.randrange(1, 90))
        with pytest.raises(DataError, match="it is made anew"):
            [Columns(bytes(damaged), "k").number("n", i) for i in range(40)]
            pytest.fail("damage was not seen")


@pytest.mark.parametrize(
    "foreign", [b"", b"x" * 7, bytes(100), b"\xff" * 4000, b"\x02\0\0\0\0\0\0\0[]", b"PK" * 99]
)
def test_foreign_files_are_no_columns(foreign: bytes, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(foreign)
    with pytest.raises(DataError, match="made anew"):
        Columns(tmp_path / "f", "k")


# --- one set


def test_shards_are_walked_once(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shards(tmp_path / "s")
    walked = walks(monkeypatch)
    first = open_shards(str(folder))
    assert walked == ["00000", "00001", "00002"]
    again = open_shards(str(folder))
    copy = pickle.loads(pickle.dumps(again))
    assert walked == ["00000", "00001", "00002"]
    assert content(first) == content(again) == content(copy)
    assert first.fingerprint == again.fingerprint == copy.fingerprint
    assert [record.id for record, _ in content(again)] == [f"{i // 3:05d}/{i:06d}" for i in range(7)]  # type: ignore[attr-defined]
    assert len(list(cache.iterdir())) == 4, "three shards and the set"
    assert len(pickle.dumps(again)) < 2000, "a worker maps the index, it does not get it"


def test_only_a_changed_shard_is_walked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shards(tmp_path / "s")
    before = open_shards(str(folder))
    other = shards(tmp_path / "t", tag=" new")
    (folder / "00001.tar").write_bytes((other / "00001.tar").read_bytes())
    age(folder / "00001.tar", 1800)
    walked = walks(monkeypatch)
    after = open_shards(str(folder))
    assert walked == ["00001"]
    assert after.fingerprint != before.fingerprint
    assert [after.record(i).captions[0] for i in (2, 3, 6)] == ["caption 2", "caption 3 new", "caption 6"]
    with pytest.raises(BadSample, match="changed since it was indexed"):
        before.image(3)


def test_a_shard_just_written_is_not_stored(tmp_path: Path, cache: Path) -> None:
    """Its file's clock may not tell a second writing from the first."""
    (path,) = write_shards(tmp_path / "s", samples(3))
    data = path.read_bytes()
    for tag in (b"caption", b"catpion", b"noitpac"):
        path.write_bytes(data.replace(b"caption", tag))
        assert open_shards(str(path)).record(1).captions[0] == f"{tag.decode()} 1"
    assert not list(cache.glob("*")) if cache.exists() else True
    assert content(pickle.loads(pickle.dumps(open_shards(str(path))))) == content(open_shards(str(path)))


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    match how:
        case "flip":
            data[-9] ^= 4
        case "header":
            data[40] ^= 1
        case "truncate":
            del data[len(data) // 2 :]
        case "empty":
            data.clear()
        case "foreign":
            data[:] = b"\x80\x04cos\nsystem\n" * 20
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["flip", "header", "truncate", "empty", "foreign", "swap"])
@pytest.mark.parametrize("parts", [False, True])
def test_a_damaged_index_is_made_anew(
    how: str, parts: bool, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shards(tmp_path / "s")
    before = content(open_shards(str(folder)))
    files = sorted(cache.iterdir(), key=lambda file: Columns(file, file.stem).length("counts"))
    if how == "swap":
        other, whole = files[0].read_bytes(), files[3].read_bytes()
        files[3].write_bytes(other)
        files[0].write_bytes(whole)
    else:
        damage(files[3], how)
    if parts:
        damage(files[1], "flip" if how == "swap" else how)
    walked = walks(monkeypatch)
    assert content(open_shards(str(folder))) == before
    assert len(walked) == parts + (how == "swap")
    walked.clear()
    assert content(open_shards(str(folder))) == before
    assert not walked


def rewritten(file: Path, **changes: Callable[[np.ndarray], np.ndarray]) -> None:
    """The same index with changed columns and valid checksums, as a bug or an attacker could write it."""
    whole = Columns(file, file.stem)
    values = {name: whole.array(name) for name in whole.names()}
    values |= {name: change(values[name]) for name, change in changes.items()}
    file.write_bytes(
        pack_columns(
            file.stem,
            {n: Column((index.SHARD_COLUMNS | index.SET_COLUMNS)[n], len(v), [v]) for n, v in values.items()},
        )
    )


def test_an_offset_beyond_the_shard_is_an_error(tmp_path: Path, cache: Path) -> None:
    folder = shards(tmp_path / "s", count=2)
    (file,) = (open_shards(str(folder)).index.columns.place,)
    assert isinstance(file, Path)
    before = content(open_shards(str(folder)))
    for column in ("offsets", "sizes"):
        for value in (10**6, 2**63 - 1, -5):
            rewritten(file, **{column: lambda a, value=value: np.full_like(a, value)})  # type: ignore[misc]
            assert content(open_shards(str(folder))) == before, (
                "a shard's own index is checked when it is opened"
            )
    folder = shards(tmp_path / "many")
    file = open_shards(str(folder)).index.columns.place
    assert isinstance(file, Path)
    for value in (10**6, 2**63 - 1, -5):
        rewritten(file, offsets=lambda a, value=value: np.full_like(a, value))  # type: ignore[misc]
        with pytest.raises(BadSample, match=r"unreadable .*00000.tar: its index points to 7 bytes at"):
            open_shards(str(folder)).image(0)
    rewritten(file, keys_ends=lambda a: a + 10**9)
    with pytest.raises(DataError, match="the keys of sample 0 lie outside of it"):
        open_shards(str(folder)).record(0)


def test_counts_are_held_against_the_index_as_against_the_shard(tmp_path: Path) -> None:
    folder = shards(tmp_path / "s", count=3)
    assert len(open_shards(str(folder))) == 3
    (folder / "00000_stats.json").write_text(json.dumps({"successes": 4}))
    with pytest.raises(DataError, match=r"00000.tar: expected 4 images by 00000_stats.json, found 3"):
        open_shards(str(folder))


def test_other_names_and_classes_have_indexes_of_their_own(tmp_path: Path) -> None:
    """Ids depend on the join, usable labels on the number of classes."""
    x = shards(tmp_path / "x", count=2)
    y = shards(tmp_path / "y", count=2)
    assert open_shards(str(x)).record(1).id == "00000/000001"
    assert open_shards(f"{x}::{y}").record(1).id == "x/00000/000001"
    write_shards(tmp_path / "c", [ShardSample(f"{i}", b"x", "png", (), i) for i in range(4)])
    age(tmp_path / "c" / "00000.tar")
    assert len(open_shards(str(tmp_path / "c"))) == 4
    (tmp_path / "c" / "classnames.txt").write_text("a\nb\nc\n")
    labelled = open_shards(str(tmp_path / "c"))
    assert (len(labelled), [problem.reason for problem in labelled.problems]) == (3, ["bad label"])
    assert labelled.problems[0].id == "00000/3"
    assert [str(problem) for problem in labelled.problems[:5]] == ["00000/3: bad label (has cls, png)"]


def test_without_a_place_for_the_cache_it_stays_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = shards(tmp_path / "s")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("THREETOWERS_CACHE", str(tmp_path / "file"))
    source = open_shards(str(folder))
    assert "set THREETOWERS_CACHE to another folder" in capfd.readouterr().err
    assert content(pickle.loads(pickle.dumps(source))) == content(source)


# --- many processes


def test_processes_make_the_same_index(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = shards(tmp_path / "s", count=24, size=2)
    alone = open_shards(str(folder))
    expected = content(alone), alone.fingerprint
    for file in cache.iterdir():
        file.unlink()
    monkeypatch.setattr(indexing, "PARALLEL_AFTER_SECONDS", 0.0)
    walked = walks(monkeypatch)
    source = open_shards(str(folder))
    assert (content(source), source.fingerprint) == expected
    assert not walked, "they were walked elsewhere"
    assert "indexing s: 12/12 shards" in capfd.readouterr().err
    for file in cache.iterdir():
        file.unlink()
    os.truncate(folder / "00005.tar", 600)
    age(folder / "00005.tar")
    with pytest.raises(DataError, match=r"00005.tar: it is cut short: .*found"):
        open_shards(str(folder))


def die_at_the_third(number: int, shard: Shard, reading: Reading) -> int:
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return STORE_INDEX(number, shard, reading)


STORE_INDEX = indexing._store_index


def test_what_a_dead_process_leaves_is_indexed_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shards(tmp_path / "s", count=10, size=2)
    monkeypatch.setattr(indexing, "PARALLEL_AFTER_SECONDS", 0.0)
    monkeypatch.setattr(indexing, "_store_index", die_at_the_third)
    walked = walks(monkeypatch)
    assert len(open_shards(str(folder))) == 10
    assert "00002" in walked


def test_processes_that_cannot_start_leave_the_work_to_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shards(tmp_path / "s")
    monkeypatch.setattr(indexing, "PARALLEL_AFTER_SECONDS", 0.0)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    walked = walks(monkeypatch)
    assert len(open_shards(str(folder))) == 7
    assert sorted(walked) == ["00000", "00001", "00002"]


SCRIPT = """
from pathlib import Path
from threetowers.data.shards import index, indexing
from threetowers.data.open import open_source

with Path("runs").open("a") as file:
    file.write("x")
indexing.PARALLEL_AFTER_SECONDS = 0.0
index.read_groups = None
print(len(open_source("s")))
"""


def test_a_script_without_a_main_guard_is_not_run_by_the_processes(tmp_path: Path) -> None:
    shards(tmp_path / "s", count=8, size=2)
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, check=True, timeout=60, capture_output=True, text=True
    )
    assert done.stdout == "8\n", "all was read by other processes"
    assert (tmp_path / "runs").read_text() == "x"


def test_indexing_processes_import_no_torch() -> None:
    program = "import sys, threetowers.data.shards.indexing\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


# --- parts


def test_stored_draws_split_as_hashing_does(tmp_path: Path) -> None:
    source = open_shards(str(shards(tmp_path / "s", count=300, size=70)))
    draws = source.split_draws(0)
    assert draws is not None
    assert draws.tolist() == [hash64("split", 0, source.record(i).id) for i in range(300)]
    assert source.split_draws(1) is None
    border = float(np.sort(draws)[100] / 2.0**64)  # a sample's own draw
    fast = split(source, val_fraction=0.3, test_fraction=border)
    source.split_draws = lambda seed: None  # type: ignore[method-assign, assignment]
    for part, slow in zip(fast, split(source, val_fraction=0.3, test_fraction=border), strict=True):
        assert isinstance(part, Subset)
        assert isinstance(slow, Subset)
        assert part.indices == slow.indices
        assert part.fingerprint == slow.fingerprint
    assert sum(map(len, fast)) == 300


@pytest.mark.parametrize("draw", [0, 2**53 + 1, 2**63 + 1025, 2**64 - 1, 2**64 - 1024, 2**64 - 1025])
def test_draws_are_rounded_as_python_rounds(draw: int) -> None:
    assert (np.array([draw], np.uint64) / 2.0**64)[0] == draw / 2**64


def test_draws_of_many_samples_are_split_in_stretches() -> None:
    draws = np.random.default_rng(0).integers(0, 2**64 - 1, 600_000, dtype=np.uint64)

    class Many:
        name, layout, class_names, templates, problems, fingerprint = "many", "", (), (), (), "f"
        record = image = None

        def __len__(self) -> int:
            return len(draws)

        def split_draws(self, seed: int) -> np.ndarray:
            return draws

    parts = split(Many(), val_fraction=0.2, test_fraction=0.1)  # type: ignore[arg-type]
    shares = draws / 2.0**64
    borders = ((0.1 + 0.2, 2.0), (0.1, 0.1 + 0.2), (0.0, 0.1))
    for part, (low, high) in zip(parts, borders, strict=True):
        assert isinstance(part, Subset)
        assert part.indices.tolist() == np.flatnonzero((shares >= low) & (shares < high)).tolist()
