"""File systems without locks and caches that cannot be written: said in one line, once, and worked around."""

import errno
import fcntl
import os
from pathlib import Path
from typing import Any

import pytest

from kit.pictures import picture
from kit.runs import Config, assert_same_weights
from threetowers.data.shards import remote
from threetowers.data.shards.source import open_shards
from threetowers.data.shards.write import ShardSample, write_shards
from threetowers.errors import CheckpointError, DataError
from threetowers.train.guards import folder_lock
from threetowers.train.loop import train

WITHOUT_LOCKS = [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EIO]


def failing(code: int) -> Any:
    def lock(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    return lock


@pytest.mark.parametrize("code", WITHOUT_LOCKS, ids=errno.errorcode.get)
def test_a_run_folder_without_locks_is_said_once_and_no_other_machine_is_made_up(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fcntl, "lockf", failing(code))
    for _ in range(2):
        with folder_lock(tmp_path):
            pass
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and "has no locks" in lines[0] and "another machine" not in lines[0]


def test_a_run_goes_on_without_locks(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tiny_config(steps=2), tmp_path / "one")
    monkeypatch.setattr(fcntl, "lockf", failing(errno.ENOLCK))
    train(tiny_config(steps=2), tmp_path / "other")
    assert_same_weights(tmp_path / "one", tmp_path / "other")


@pytest.mark.parametrize("code", [errno.EACCES, errno.EAGAIN], ids=errno.errorcode.get)
def test_a_folder_that_is_held_says_who_holds_it(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".lock").write_text("77 on node-3")
    monkeypatch.setattr(fcntl, "lockf", failing(code))
    with pytest.raises(CheckpointError, match="process 77 on node-3 is training"), folder_lock(tmp_path):
        pass


@pytest.mark.parametrize("code", WITHOUT_LOCKS, ids=errno.errorcode.get)
def test_a_cache_without_locks_still_takes_fetched_shards(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THREETOWERS_CACHE", str(tmp_path))
    monkeypatch.setattr(fcntl, "flock", failing(code))
    with remote._locked("s3://bucket/0.tar"):
        pass


def shards(folder: Path) -> str:
    write_shards(folder, [ShardSample(f"{n}", picture(n), "png", (f"picture {n}",), None) for n in range(4)])
    for path in folder.iterdir():
        os.utime(path, (1, 1))  # a fresh shard has no stored index
    return str(folder)


def test_a_cache_that_cannot_be_written_is_one_plain_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("THREETOWERS_CACHE", str(tmp_path / "file"))
    for name in ("a", "b"):
        assert len(open_shards(shards(tmp_path / name))) == 4
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("threetowers: ") and "THREETOWERS_CACHE" in lines[0]


def test_a_read_only_cache_of_fetched_shards_names_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THREETOWERS_CACHE", str(tmp_path))
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(DataError, match="cannot be written; set THREETOWERS_CACHE"):
        remote.fetch("s3://bucket/0.tar")


def test_no_raw_warning_is_raised_by_the_source() -> None:
    source = Path(remote.__file__).parents[2]
    users = [
        path.name for path in source.rglob("*.py") if "warnings.warn(" in path.read_text(encoding="utf-8")
    ]
    assert users == []
