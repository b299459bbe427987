"""The pixels that this process keeps for its later visits of the same images.

All runs of a process share them, since a source is known by its fingerprint: the runs of a comparison decode its images
once.
"""

from functools import lru_cache

from threetowers.data.kept import KeptImages, KeptMemory, new_memory
from threetowers.data.source import Source
from threetowers.data.transforms import ImageSpec

LARGEST_SHARE = 4
"""Fixed views are kept of sources whose views fit into one part in so many of the memory for pixels."""


def kept_images(source: Source) -> KeptImages | None:
    """Where the decoded images of a source stay; None where memory cannot be shared."""
    return _kept(source.fingerprint, len(source), None)


def kept_views(source: Source, image: ImageSpec) -> KeptImages | None:
    """Where the fixed views of a source's images stay; None for a source that is too large."""
    memory = _memory()
    if memory is None or len(source) * 3 * image.size**2 > memory.capacity // LARGEST_SHARE:
        return None
    return _kept(source.fingerprint, len(source), image)


@lru_cache(maxsize=1)
def _memory() -> KeptMemory | None:
    return new_memory()


@lru_cache(maxsize=16)
def _kept(fingerprint: str, num: int, image: ImageSpec | None) -> KeptImages | None:
    memory = _memory()
    return None if memory is None else KeptImages(memory, num)
