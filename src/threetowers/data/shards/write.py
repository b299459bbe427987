"""Writes tar shards in the layout of webdataset and img2dataset; the same samples always give the same bytes."""

import itertools
import json
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from threetowers.data.shards.groups import key_and_ending
from threetowers.data.source import IMAGE_ENDINGS, clean_captions
from threetowers.errors import DataError, UsageError
from threetowers.files import write_whole


@dataclass(frozen=True, slots=True)
class ShardSample:
    """One sample to write. image: the encoded file; extension: its ending, without the dot."""

    key: str
    image: bytes
    extension: str
    captions: tuple[str, ...] = ()
    label: int | None = None


def write_shards(
    directory: str | Path, samples: Iterable[ShardSample], *, shard_size: int = 2500
) -> list[Path]:
    """Writes `00000.tar`, `00001.tar`, … and their `_stats.json`; the same samples always give the same bytes.

    Samples are sorted by key inside a shard, and a shard gets its name only when it is complete. Returns the paths.
    Raises UsageError when the folder holds shards already, DataError for a sample that could not be read back.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.glob("*.tar")):
        raise UsageError(f"{folder} holds shards already; delete them or choose another folder")
    paths: list[Path] = []
    stream = iter(samples)
    while batch := sorted(itertools.islice(stream, shard_size), key=lambda sample: sample.key):
        path = folder / f"{len(paths):05d}.tar"
        stats = json.dumps({"count": len(batch), "successes": len(batch)})
        write_whole(path, _shard_bytes(path, batch), sync=True)
        write_whole(path.with_name(f"{path.stem}_stats.json"), stats, sync=True)
        paths.append(path)
    return paths


def _shard_bytes(path: Path, samples: Sequence[ShardSample]) -> bytes:
    buffer, previous = BytesIO(), None
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for sample in samples:
            if sample.key == previous:
                raise DataError(f"{path}: the key {sample.key!r} is given twice")
            if not sample.key or key_and_ending(f"{sample.key}.x") != (sample.key, "x") or "\0" in sample.key:
                raise DataError(f"{path}: the key {sample.key!r} is empty, hidden or has a dot")
            if sample.extension not in IMAGE_ENDINGS:
                raise DataError(
                    f"{path}: {sample.key!r} ends in {sample.extension!r}; known: {', '.join(IMAGE_ENDINGS)}"
                )
            previous = sample.key
            members = {sample.extension: sample.image}
            if sample.captions or sample.label is None:
                members["txt"] = "\n".join(clean_captions(sample.captions)[0]).encode()
            if sample.label is not None:
                members["cls"] = str(sample.label).encode()
            for ending, data in sorted(members.items()):
                member = tarfile.TarInfo(f"{sample.key}.{ending}")  # owner, group and time are 0
                member.size = len(data)
                tar.addfile(member, BytesIO(data))
    return buffer.getvalue()
