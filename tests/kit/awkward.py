"""Changes of the folder of kit/mistakes.py to what people have on disk: columns, addresses, parts, formats."""

import gzip
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

from kit.mistakes import NUM_PHOTOS, Change


def rows_of(header: str, row: Callable[[int], str]) -> Change:
    """The table's rows are these, by the number of the photo."""

    def change(folder: Path) -> None:
        lines = [header, *(row(number) for number in range(NUM_PHOTOS))]
        (folder / "photos" / "captions.csv").write_text("\n".join(lines) + "\n")

    return change


def as_parquet(folder: Path) -> None:
    """photos.parquet, which holds the photos themselves."""
    import pyarrow
    from pyarrow import parquet

    photos = sorted((folder / "photos").glob("*.jpg"))
    rows = [{"image": {"bytes": photo.read_bytes()}, "caption": f"a photo {photo.stem}"} for photo in photos]
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "photos.parquet")


def as_jxl(folder: Path) -> None:
    """phone/, with pictures of a format that is not read and their captions."""
    (folder / "phone").mkdir()
    for photo in (folder / "photos").glob("*.jpg"):
        (folder / "phone" / photo.name).with_suffix(".jxl").write_bytes(photo.read_bytes())
        (folder / "phone" / photo.name).with_suffix(".txt").write_text("a photo")


def as_shard(folder: Path) -> None:
    """shards/00000.tar, whose captions are in each sample's json under the key `blip`."""
    (folder / "shards").mkdir()
    with tarfile.open(folder / "shards" / "00000.tar", "w") as tar:
        for photo in sorted((folder / "photos").glob("*.jpg")):
            about = json.dumps({"url": "x", "blip": f"a photo {photo.stem}"}).encode()
            tar.add(photo, photo.name)
            info = tarfile.TarInfo(f"{photo.stem}.json")
            info.size = len(about)
            tar.addfile(info, io.BytesIO(about))


def as_compressed_shard(folder: Path) -> None:
    """shards/00000.tar.gz alone."""
    as_shard(folder)
    plain = folder / "shards" / "00000.tar"
    (folder / "shards" / "00000.tar.gz").write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()
