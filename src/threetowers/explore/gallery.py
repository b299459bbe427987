"""The images and captions that the page searches, and their vectors by every model.

Vectors of a run's own test data come from its evaluation. Those of other data are computed once and kept in the cache
folder.

Legend: N images, M captions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from threetowers.data.decode import decode
from threetowers.data.source import Source
from threetowers.errors import BadSample, DataError
from threetowers.evaluate.encode import Encoded, samples_of_images, texts_of
from threetowers.explore.models import BATCH, Model, Vectors
from threetowers.files import cache_folder
from threetowers.progress import Progress
from threetowers.towers.weights import read_safetensors, write_safetensors

THUMBNAIL = 320
"""Pixels of the longer side at most of the images that the page shows."""
KEPT_THUMBNAILS = 2_000
_LOSSLESS = 128  # px up to which images are sent as PNG


class Features(NamedTuple):
    """One model's vectors of a source. images, texts: by system. used: int64 [N], the images that have a row."""

    images: Vectors
    texts: Vectors
    used: Tensor


@dataclass(frozen=True, eq=False)
class Gallery:
    """N images and M captions of a source.

    name: for people. index: of each image in the source. text_image: the row of each caption's image. is_test: whether
    these are the test data of a run. trained: the samples of the source that a run was trained on, None where that is
    not known.
    """

    name: str
    source: Source
    index: list[int]
    captions: list[str]
    text_image: list[int]
    is_test: bool = False
    trained: frozenset[int] | None = None

    def __post_init__(self) -> None:
        # of this gallery alone, and so not a decorator of the method
        object.__setattr__(self, "thumbnail", lru_cache(KEPT_THUMBNAILS)(self.thumbnail))

    def id(self, row: int) -> str:
        return self.source.record(self.index[row]).id

    def captions_of(self, row: int) -> list[str]:
        """The captions that the source has for the image of a row."""
        return list(self.source.record(self.index[row]).captions)

    @property
    def num_trained(self) -> int | None:
        """Images that a run was trained on; None where that is not known."""
        return None if self.trained is None else sum(self.is_trained(row) for row in range(len(self.index)))

    def is_trained(self, row: int) -> bool:
        """Whether it is known that a run was trained on the image of a row."""
        return self.trained is not None and self.index[row] in self.trained

    def thumbnail(self, row: int) -> tuple[bytes, str]:
        """A small image file and its media type, encoded anew: what the source stores is never sent.

        Raises BadSample when the image cannot be read any more.
        """
        image = self.image(row)
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        file = BytesIO()
        small = max(image.size) <= _LOSSLESS
        image.save(file, "PNG" if small else "JPEG", quality=88)
        return file.getvalue(), "image/png" if small else "image/jpeg"

    def image(self, row: int) -> Image.Image:
        """The whole image, upright RGB; raises BadSample when it cannot be read."""
        index = self.index[row]
        return decode(self.source.image(index), self.source.record(index).id)


def open_gallery(
    models: Sequence[Model], source: Source, name: str, *,
    is_test: bool = False, trained: frozenset[int] | None = None,
) -> tuple[Gallery, list[Features]]:  # fmt: skip
    """The images of a source that every model has vectors of, their captions, and each model's vectors of them.

    name, is_test, trained: as in Gallery. Raises DataError when no image can be used by all.
    """
    found = [features(model, source) for model in models]
    usable = set(found[0].used.tolist()).intersection(*(each.used.tolist() for each in found))
    samples = samples_of_images(source, merge=True)
    index = [i for i in samples if i in usable]
    if not index:
        raise DataError(f"{source.name}: no image can be read by all of the runs")
    chosen = torch.tensor(index)
    common = []
    for each in found:
        rows = torch.isin(each.used, chosen)
        texts = rows[torch.tensor(texts_of(source, each.used.tolist(), samples).rows, dtype=torch.long)]
        common.append(Features(
            {name: value[rows] for name, value in each.images.items()},
            {name: value[texts] for name, value in each.texts.items()},
            chosen,
        ))  # fmt: skip
    kept = texts_of(source, index, samples)
    return Gallery(name, source, index, kept.captions, kept.rows, is_test, trained), common


def features(model: Model, source: Source) -> Features:
    """A model's vectors of a source: as its evaluation wrote them, as an earlier call kept them, or computed now."""
    known = _evaluated(model, source)
    if known is not None:
        return known
    key = f"{model.run.described['sha256'][:16]}-{source.fingerprint[:16]}-{len(source)}"
    path = cache_folder() / "explore" / f"{key}.safetensors"
    if path.is_file():
        tensors = read_safetensors(path)
    else:
        tensors = _flat(_embed(model, source))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_safetensors(path, tensors)
    return Features(
        {name: tensors[f"images/{name}"] for name in model.systems},
        {name: tensors[f"texts/{name}"] for name in model.systems},
        tensors["index"],
    )


def _flat(each: Features) -> dict[str, Tensor]:
    tensors = {f"images/{name}": value for name, value in each.images.items()}
    tensors |= {f"texts/{name}": value for name, value in each.texts.items()}
    return {name: value.contiguous() for name, value in tensors.items()} | {"index": each.used}


def _evaluated(model: Model, source: Source) -> Features | None:
    """The vectors in a run's features.safetensors, when those are of this source."""
    path = model.folder / "features.safetensors"
    part = model.run.described.get("data", {}).get("test", {})
    if part.get("fingerprint") != source.fingerprint or not path.is_file():
        return None
    tensors = read_safetensors(path)
    if "test/text_image" not in tensors:
        return None
    views = {name.removeprefix("test/"): value for name, value in tensors.items() if name.startswith("test/")}
    text_image, index = views.pop("text_image"), views.pop("index")
    views.pop("text_group", None)
    texts = texts_of(source, index.tolist(), samples_of_images(source, merge=True))
    if not torch.equal(torch.tensor(texts.rows), text_image):
        return None  # the data have changed since the evaluation
    thirds = frozenset(view for view, tower in model.towers.items() if tower.reads == "texts")
    encoded = Encoded(views, text_image, index, texts.captions, [], thirds)
    systems = {name: encoded.system(name) for name in model.systems}
    images = {name: pair[0] for name, pair in systems.items()}
    return Features(images, {name: pair[1] for name, pair in systems.items()}, index)


def _embed(model: Model, source: Source) -> Features:
    samples = samples_of_images(source, merge=True)
    chosen = list(samples)
    progress = Progress(f"embedding for {Path(model.folder).name}", len(chosen), "images", quiet_seconds=2)
    index: list[int] = []
    parts: list[Vectors] = []
    for start in range(0, len(chosen), BATCH):
        images, readable = [], []
        for i in chosen[start : start + BATCH]:
            try:
                images.append(decode(source.image(i), source.record(i).id))
                readable.append(i)
            except BadSample:
                continue
        if images:
            parts.append(model.encode_images(images))
            index += readable
        progress.update(min(start + BATCH, len(chosen)))
    if not index:
        raise DataError(f"{source.name}: not one of its {len(chosen):,} images can be read")
    texts = model.encode_texts(texts_of(source, index, samples).captions)
    return Features(
        {name: torch.cat([part[name] for part in parts]) for name in model.systems},
        texts,
        torch.tensor(index),
    )
