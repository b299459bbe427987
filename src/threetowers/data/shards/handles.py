"""Shards that are open for reading, as many at a time as the system's limit of open files allows."""

import os
import resource
from functools import lru_cache

from threetowers.data.shards.index import Shard
from threetowers.data.shards.remote import is_address, redacted
from threetowers.data.shards.tar import OpenFile

_LIMIT = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
_ALLOWED = _LIMIT if 0 < _LIMIT < 1 << 20 else 1 << 20
MOST_OPEN = max(min(256, _ALLOWED // 4), 4)
"""Local shards that stay open; the rest of the limit is for loader workers, stores and libraries."""
_MOST_OPEN_REMOTE = max(min(32, _ALLOWED // 8), 2)


@lru_cache(maxsize=MOST_OPEN)
def _open_local(shard: Shard) -> OpenFile:
    return shard.open()


@lru_cache(maxsize=_MOST_OPEN_REMOTE)  # open shards are not evicted, so this many must fit into the cache
def _open_remote(shard: Shard) -> OpenFile:
    return shard.open()


def read_extent(shard: Shard, offset: int, size: int) -> bytes:
    """The bytes of an image in a shard; raises OSError that names the shard when they cannot be read."""
    if not (offset >= 0 and 0 < size <= shard.size - offset):
        detail = f"its index points to {size} bytes at {offset} of {shard.size}"
        raise OSError(f"{redacted(shard.place)}: {detail}")
    try:
        # The name keeps the file open while it is read, when another thread pushes it out of the cache.
        file = _open_remote(shard) if is_address(shard.place) else _open_local(shard)
        data = os.pread(file.number, size, offset)
    except OSError as error:
        raise OSError(f"{redacted(shard.place)}: {error}") from error
    if len(data) != size:
        raise OSError(f"{redacted(shard.place)}: {len(data)} of {size} bytes")
    return data
