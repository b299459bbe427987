"""The pixels that this process keeps for its later visits of the same images.

All runs of a process share them, since a source is known by its fingerprint: the runs of a comparison decode its images
once. Processes that train side by side are given the same memory.
"""

from dataclasses import dataclass, field

from threetowers.data.kept import KeptImages, KeptMemory, new_memory
from threetowers.data.source import Source
from threetowers.data.transforms import ImageSpec

LARGEST_SHARE = 4
"""Fixed views are kept of sources whose views fit into one part in so many of the memory for pixels."""


@dataclass
class Pixels:
    """Memory for pixels, and what is kept in it, by a source's fingerprint and the view, None for decoded images.

    memory: None where it cannot be shared. A copy in another process, made by pickling, shares what was there then.
    """

    memory: KeptMemory | None = field(default_factory=new_memory)
    kept: dict[tuple[str, ImageSpec | None], KeptImages] = field(default_factory=dict)

    def of(self, source: Source, view: ImageSpec | None) -> KeptImages | None:
        """Where the pixels of a source stay; None where there is no memory for them."""
        key = source.fingerprint, view
        if self.memory is not None and key not in self.kept:
            self.kept[key] = KeptImages(self.memory, len(source))
        return self.kept.get(key)


_of_this_process: list[Pixels] = []


def pixels() -> Pixels:
    """Those of this process, made when they are first asked for."""
    if not _of_this_process:
        share_pixels(Pixels())
    return _of_this_process[0]


def share_pixels(given: Pixels) -> None:
    """Makes this process use the pixels of another."""
    _of_this_process[:] = [given]


def kept_images(source: Source) -> KeptImages | None:
    """Where the decoded images of a source stay; None where memory cannot be shared."""
    return pixels().of(source, None)


def kept_views(source: Source, image: ImageSpec) -> KeptImages | None:
    """Where the fixed views of a source's images stay; None for a source that is too large."""
    memory = pixels().memory
    if memory is None or len(source) * 3 * image.size**2 > memory.capacity // LARGEST_SHARE:
        return None
    return pixels().of(source, image)
