"""What a folder holds, and tar files as webdataset writes them."""

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file by its path in the folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def tar(path: Path, members: Iterable[tuple[str, bytes]], *, format: int = tarfile.PAX_FORMAT) -> Path:
    """A tar of these members; in PAX the fractional time gives each of them an extended header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(data), 1700000000.25  # type: ignore[assignment]
            archive.addfile(member, io.BytesIO(data))
    return path
