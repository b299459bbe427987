"""Remote shards: fetched once, checked, evicted by age and fetched again; the addresses here are fsspec's memory."""

import io
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from kit.sources import content
from threetowers.data.open import open_source
from threetowers.data.shards import handles, index, remote
from threetowers.data.shards.source import ShardSource, open_shards
from threetowers.data.shards.write import ShardSample, write_shards
from threetowers.errors import DataError, UsageError

SET = "memory://set/{00000..00003}.tar"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("THREETOWERS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "PAUSE_SECONDS", 0.0)
    yield tmp_path / "cache" / "remote"
    close()


def close() -> None:
    """Closes the shards that this process has open."""
    handles._open_remote.cache_clear()
    handles._open_local.cache_clear()


@pytest.fixture
def local(tmp_path: Path) -> Path:
    """Four shards of 20 kB, in a folder and in fsspec's memory."""
    images = ((f"{i:06d}", bytes([i]) * 9000) for i in range(8))
    samples = [ShardSample(key, image, "png", (f"caption {key}",)) for key, image in images]
    for path in write_shards(tmp_path / "set", samples, shard_size=2):
        os.utime(path, (1e9, 1e9))
    memory = MemoryFileSystem()
    memory.store.clear()
    for path in (tmp_path / "set").iterdir():
        memory.pipe_file(f"/set/{path.name}", path.read_bytes())
    return tmp_path / "set"


@pytest.fixture
def fetches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the shards that are fetched."""
    names: list[str] = []
    opened = MemoryFileSystem.open

    def counted(self: Any, path: str, *args: Any, **more: Any) -> Any:
        if path.endswith(".tar"):
            names.append(path[-6:-4])
        return opened(self, path, *args, **more)

    monkeypatch.setattr(MemoryFileSystem, "open", counted)
    return names


def kept(cache: Path) -> int:
    return len(list(cache.glob("*.tar")))


def limit(monkeypatch: pytest.MonkeyPatch, num_shards: float, size: int) -> None:
    monkeypatch.setenv("THREETOWERS_CACHE_GB", str(num_shards * size / 1e9 + 1e-6))


def test_addresses_read_as_the_files_do(local: Path, cache: Path, fetches: list[str]) -> None:
    near, far = open_shards(str(local)), open_shards(SET)
    assert content(far) == content(near)
    assert far.fingerprint == near.fingerprint, "where a shard lies is not what it is"
    assert (far.name, far.layout, len(far.problems)) == ("set", "4 tar shards", 0)
    again = open_shards(SET)
    assert content(again) == content(far)
    assert sorted(fetches) == ["00", "01", "02", "03"]
    assert kept(cache) == 4
    assert len(open_source(f"file://{local}/00000.tar::{local}/00001.tar")) == 4


def test_an_index_outlives_its_shard(
    local: Path, cache: Path, fetches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening a set whose shards were all evicted fetches none; reading an image fetches its own."""
    expected = content(open_shards(SET))
    close()
    for path in cache.glob("*.tar"):
        path.unlink()
    fetches.clear()
    monkeypatch.setattr(index, "read_groups", None)
    source = open_shards(SET)
    assert not fetches
    assert source.image(5) == expected[5][1]
    assert fetches == ["02"]
    assert content(source) == expected


def test_the_least_recently_used_goes_and_what_is_open_stays(
    local: Path, cache: Path, fetches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (local / "00000.tar").stat().st_size
    source = open_shards(SET)
    for place, seconds in enumerate((400, 100, 300, 200)):
        path = remote._local(f"memory://set/{place:05d}.tar")
        os.utime(path, (time.time() - seconds,) * 2)
    source.image(0)  # the oldest, used again
    close()
    limit(monkeypatch, 3, size)
    remote.make_room(size, "memory://set/x.tar")
    left = {place for place in range(4) if remote._local(f"memory://set/{place:05d}.tar").exists()}
    assert left == {0, 1}, "of 400, 100, 300 and 200 s"
    fetches.clear()
    limit(monkeypatch, 1, size)
    assert [source.image(2 * place)[0] for place in (0, 1, 2, 3)] == [0, 2, 4, 6]
    assert fetches == ["02", "03"]
    assert kept(cache) == 4, "all four are open"
    close()
    remote.make_room(0, "memory://set/x.tar")
    assert kept(cache) == 1


def test_shards_pass_through_a_cache_that_holds_one(
    local: Path, cache: Path, fetches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    limit(monkeypatch, 1.5, (local / "00000.tar").stat().st_size)
    monkeypatch.setattr("threetowers.data.shards.indexing.DOWNLOADS", 1)
    source = open_shards(SET)
    assert kept(cache) == 1
    assert sorted(fetches) == ["00", "01", "02", "03"], "each was indexed before it had to go"
    expected = content(open_shards(str(local)))
    for place in (0, 7, 3, 0):
        close()
        assert source.image(place) == expected[place][1]
        assert kept(cache) == 1


def test_a_shard_larger_than_the_cache_is_refused(local: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit(monkeypatch, 0.5, (local / "00000.tar").stat().st_size)
    with pytest.raises(DataError, match="set THREETOWERS_CACHE_GB higher"):
        open_shards(SET)
    monkeypatch.setenv("THREETOWERS_CACHE_GB", "much")
    with pytest.raises(UsageError, match="THREETOWERS_CACHE_GB is 'much'"):
        open_shards(SET)


def test_a_shard_that_changes_at_its_address_is_an_error(local: Path, cache: Path) -> None:
    source = open_shards(SET)
    close()
    other = (local / "00001.tar").read_bytes().replace(b"caption", b"catpion")
    MemoryFileSystem().pipe_file("/set/00001.tar", other)
    assert source.image(2), "the copy in the cache is as it was"
    close()
    remote._local("memory://set/00001.tar").unlink()
    with pytest.raises(
        DataError, match=r"memory://set/00001.tar: it is another file than when it was indexed"
    ):
        source.image(2)
    assert not list(cache.glob("*.tmp"))
    remote._note("memory://set/00001.tar").unlink()
    assert open_shards(SET).record(2).captions[0].startswith("catpion")
    with pytest.raises(DataError, match="another file"):
        source.image(2)


@pytest.mark.parametrize("how", ["shorter", "flipped"])
def test_a_damaged_copy_is_fetched_again(how: str, local: Path, fetches: list[str]) -> None:
    """By size whenever it is opened, by digest before it is indexed."""
    expected = content(open_shards(SET))
    close()
    path = remote._local("memory://set/00002.tar")
    data = bytearray(path.read_bytes())
    if how == "shorter":
        del data[5000:]
    else:
        data[600] ^= 255
        for file in (path.parent.parent / "index").iterdir():
            file.unlink()
    path.write_bytes(data)
    fetches.clear()
    assert content(open_shards(SET)) == expected
    assert fetches == ["02"]


def test_a_damaged_note_is_made_anew(local: Path) -> None:
    expected = content(open_shards(SET))
    close()
    for note in (b"", b"[]", b'{"size": 3}', b'{"size": "x", "sha256": "zz", "stats": ""}'):
        remote._note("memory://set/00002.tar").write_bytes(note)
        remote._local("memory://set/00002.tar").unlink(missing_ok=True)
        assert content(open_shards(SET)) == expected
        close()


def failing(monkeypatch: pytest.MonkeyPatch, times: int, make: Callable[[bytes], io.BytesIO]) -> list[str]:
    opened, calls = MemoryFileSystem.open, list[str]()

    def broken(self: Any, path: str, *args: Any, **more: Any) -> Any:
        calls.append(path)
        if path.endswith(".tar") and len(calls) <= times:
            return make(self.cat_file(path))
        return opened(self, path, *args, **more)

    monkeypatch.setattr(MemoryFileSystem, "open", broken)
    return calls


class Cut(io.BytesIO):
    """A connection that ends early."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data[: len(data) // 2])
        self.size = len(data)


def test_what_comes_short_is_tried_again(local: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, 2, Cut)
    assert len(open_shards("memory://set/00000.tar")) == 2
    failing(monkeypatch, 99, Cut)
    with pytest.raises(
        DataError,
        match=r"memory://set/00001.tar: it cannot be fetched, 3 times tried: expected \d+ bytes, found",
    ):
        open_shards("memory://set/00001.tar")
    assert kept(cache) == 1
    assert not list(cache.glob(".*"))


def test_stats_and_class_names_beside_an_address(local: Path) -> None:
    memory = MemoryFileSystem()
    memory.pipe_file("/classnames.txt", b"cat\ndog\n")
    assert list(open_shards(SET).class_names) == ["cat", "dog"]
    memory.pipe_file("/set/00000_stats.json", json.dumps({"successes": 5}).encode())
    remote._note("memory://set/00000.tar").unlink()
    with pytest.raises(
        DataError, match=r"memory://set/00000.tar: expected 5 images by 00000_stats.json, found 2"
    ):
        open_shards(SET)


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("memory://set/00009.tar", DataError, r"memory://set/00009.tar: there is no such shard"),
        ("memory://set", UsageError, r"name the shards, for example memory://set/\{00000..00011\}.tar"),
        ("nothing://host/0.tar", UsageError, "nothing://host/.*: Protocol not known: nothing"),
        ("memory://set/00000.tar::memory://set/00000.tar", UsageError, "named twice"),
        ("nothing://me:secret@host/0.tar?token=secret", UsageError, r"^nothing://host/[^?@]*$"),
    ],
)
def test_addresses_that_cannot_be_meant(path: str, error: type[Exception], message: str, local: Path) -> None:
    with pytest.raises(error, match=message):
        open_source(path)


def read(source: ShardSource, expected: list[tuple[object, bytes]]) -> None:
    assert content(source) == expected


def test_processes_share_the_cache(local: Path, cache: Path) -> None:
    """Each fetches what the other has just evicted, from addresses that both can read."""
    source = open_shards(f"file://{local}/{{00000..00003}}.tar")
    expected = content(source)
    close()
    for path in cache.glob("*.tar"):
        path.unlink()
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=read, args=(source, expected)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert kept(cache) == 4
