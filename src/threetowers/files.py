"""The folder for what can be made or fetched again: indexes and remote shards. It may be deleted at any time."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def cache_folder() -> Path:
    """`$THREETOWERS_CACHE`, else `~/.cache/threetowers`."""
    given = os.environ.get("THREETOWERS_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "threetowers"


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that appears under its name when the block ends, and not at all when it fails."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with temporary.open("w+b") as file:
            yield file
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
