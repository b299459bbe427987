"""The views of images that are embedded, read and decoded batch by batch.

Legend: B images of a batch, V stored views of each (1 when one fixed view is stored), K random views (0 then).
"""

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from threetowers.data.decode import decode
from threetowers.data.order import hash64
from threetowers.data.source import Source
from threetowers.data.transforms import ImageSpec, cropped_view, fixed_view, random_crop
from threetowers.errors import BadSample
from threetowers.store.read import Views, as_crop


class Task(NamedTuple):
    """A batch of samples, the chunk that it belongs to, and whether it is the chunk's last."""

    chunk: int
    samples: range
    last: bool


class Read(NamedTuple):
    """What was read of a batch: the readable samples, uint8 pixels [B, V, 3, H, W], crops float32 [B, K, 5]."""

    kept: list[int]
    pixels: Tensor
    crops: np.ndarray
    bad: list[BadSample]


class Pictures:
    """The views of a batch of images. pool: threads that decode; None decodes in this one, as loader workers do."""

    def __init__(
        self, source: Source, image: ImageSpec, views: Views, pool: ThreadPoolExecutor | None
    ) -> None:
        self.source, self.image, self.views, self.pool = source, image, views, pool

    def __getitem__(self, task: Task) -> tuple[Task, Read]:
        kept, pixels, crops, bad = [], [], [], []
        ids = [self.source.record(index).id for index in task.samples]
        files = map(self._file, task.samples)  # read in this thread: a source is not made for several
        mapped = map if self.pool is None else self.pool.map
        for index, id, found in zip(task.samples, ids, mapped(self._decoded, files, ids), strict=True):
            if isinstance(found, BadSample):  # once more, since a disk or a network may have been at fault
                found = self._decoded(self._file(index), id)
            if isinstance(found, BadSample):
                bad.append(found)  # the loader meets the same sample, counts it and names it
                continue
            kept.append(index)
            if self.views.num:
                drawn = stored_crops(self.views, id, (found.shape[1], found.shape[0]))
                crops.append(drawn)
                found = np.stack([cropped_view(found, as_crop(row), self.image) for row in drawn])
            pixels.append(found)
        stacked = torch.from_numpy(np.stack(pixels)) if pixels else torch.empty(0, dtype=torch.uint8)
        boxes = np.stack(crops) if crops else np.empty((0, self.views.num, 5), np.float32)
        return task, Read(kept, stacked, boxes, bad)

    def _file(self, index: int) -> bytes | BadSample:
        try:
            return self.source.image(index)
        except BadSample as problem:
            return problem

    def _decoded(self, file: bytes | BadSample, id: str) -> np.ndarray | BadSample:
        """The fixed view uint8 [1, 3, H, W], or the whole image [H, W, 3] where regions of it are stored."""
        if isinstance(file, BadSample):
            return file
        try:
            image = decode(file, id)
        except BadSample as problem:
            return problem
        return np.asarray(image) if self.views.num else fixed_view(image, self.image)[None]


def stored_crops(views: Views, id: str, size: tuple[int, int]) -> np.ndarray:
    """The random views of an image as they are stored, float32 [K, 5]; size: (width, height)."""
    drawn = [
        random_crop(hash64(views.seed, "view", k, id), size, views.crop_scale, views.crop_ratio, views.flip)
        for k in range(views.num)
    ]
    return np.array([[*crop.box, crop.flip] for crop in drawn], dtype=np.float32)
