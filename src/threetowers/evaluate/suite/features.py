"""The features of a target on the data of a suite: computed once and kept by the weights' digest, or read from files.

    features = TowerFeatures(open_target("runs/mine"), Path("features"))
    rows = features.images(Part("digits", "test", source))

Legend: N images that can be used, M texts, D width.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from threetowers.data.source import Source
from threetowers.errors import BadSample, DataError
from threetowers.evaluate.encode import Encoded, samples_of_images, texts_of
from threetowers.evaluate.retrieval import check_features
from threetowers.evaluate.suite.target import TARGETS, Target, open_target
from threetowers.evaluate.zero_shot import class_embeddings
from threetowers.files import digest_file
from threetowers.objective.losses import unit
from threetowers.store.embed import find_or_make_store
from threetowers.store.read import Store
from threetowers.towers.frozen.base import FrozenTower, digest_of
from threetowers.towers.weights import read_safetensors

_BATCH = 256


class Part(NamedTuple):
    """Some data of a suite. data: the name of the data set. label: train, val, test or outside."""

    data: str
    label: str
    source: Source

    @property
    def name(self) -> str:
        return f"{self.data}/{self.label}"


class ImageRows(NamedTuple):
    """Features float32 [N, D] of the images that can be used, and the sample of each in its source, int64 [N]."""

    features: Tensor
    samples: Tensor


class Features(Protocol):
    """A model by its features. name: as the user wrote it. digest: changes with what the features depend on.

    scale: what cosines are multiplied by to be logits; None where that is not known. views: of images, `img` and, where
    the model learned from frozen towers, the names of these. preprocessing: what is done to images, in words.
    """

    name: str
    digest: str
    scale: float | None
    views: Sequence[str]
    preprocessing: str

    def images(self, part: Part, view: str = "img") -> ImageRows:
        """Features of a part's images in a view; unit vectors in `img`, as they are in a frozen tower's view."""
        ...

    def captions(self, part: Part, samples: Sequence[int]) -> Tensor:
        """Unit vectors float32 [M, D] of all captions of some samples, one after the other."""
        ...

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors float32 [M, D] of any texts."""
        ...

    def classes(self, part: Part, names: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Unit vectors float32 [C, D] of classes, as `zero_shot.class_embeddings` makes them."""
        ...


class TowerFeatures:
    """Features that a target computes; those of a source's images and captions are stored in a folder, in fp32."""

    def __init__(
        self, target: Target, folder: Path, device: torch.device | str = "cpu", workers: int = 0
    ) -> None:
        self.target, self.folder, self.device, self.workers = target, folder, torch.device(device), workers
        self.name, self.digest = target.name, target.digest()
        self._stores: dict[tuple[str, str], Store] = {}
        self._classes: dict[tuple[tuple[str, ...], tuple[str, ...]], Tensor] = {}
        self.scale: float | None = target.scale
        self.views: Sequence[str] = ("img", *target.thirds)
        spec = target.image.image
        self.preprocessing = (
            f"{spec.resize} {spec.resize_size or spec.size}, crop {spec.size}, {spec.interpolation}; mean "
            f"{list(spec.mean)}, std {list(spec.std)}"
        )

    def images(self, part: Part, view: str = "img") -> ImageRows:
        tower = self.target.image if view == "img" else self.target.thirds[view]
        store = self._store(tower, part.source)
        index = np.flatnonzero(store.usable)
        if not len(index):
            raise DataError(f"{part.name}: not one of its {len(part.source):,} images can be read")
        rows = store.rows(index)
        return ImageRows(unit(rows) if view == "img" else rows, torch.from_numpy(index))

    def captions(self, part: Part, samples: Sequence[int]) -> Tensor:
        counts = [len(part.source.record(sample).captions) for sample in samples]
        which = [place for count in counts for place in range(count)]
        store = self._store(self.target.text, part.source)
        return unit(store.rows(np.repeat(np.asarray(samples), counts), np.asarray(which)))

    def texts(self, texts: Sequence[str]) -> Tensor:
        tower, parts = self.target.text, []
        for start in range(0, len(texts), _BATCH):
            tokens = tower.tokens(texts[start : start + _BATCH])
            parts.append(unit(tower(tokens.to(self.device))).cpu())
        return torch.cat(parts) if parts else torch.empty(0, tower.width)

    def classes(self, part: Part, names: Sequence[str], templates: Sequence[str]) -> Tensor:
        prompts = tuple(names), tuple(templates)
        if prompts not in self._classes:  # several tasks ask for those of a data set
            self._classes[prompts] = class_embeddings(self.texts, names, templates)
        return self._classes[prompts]

    def _store(self, tower: FrozenTower, source: Source) -> Store:
        key = tower.view, source.fingerprint
        if key not in self._stores:  # a store is checked byte by byte when it is opened
            self._stores[key] = find_or_make_store(
                tower, source, self.folder, self.device,
                dtype="fp32", fingerprints=self.target.fingerprints[tower.view], workers=self.workers,
            )  # fmt: skip
        return self._stores[key]


FEATURES = "features:"
"""What the name of a folder of stored features begins with."""


class StoredFeatures:
    """Features that another program has computed: a file `NAME.safetensors` for each data set.

    Its tensors are `PART/image` [number of samples, D], `PART/text` [number of captions, D] in the order of the data,
    and `classes` [C, D]; PART is train, val or test. `scale`, one number, may be among them. The folder's name follows
    `features:`. Raises DataError for a folder or a tensor that is missing or of another size than the data.
    """

    views: Sequence[str] = ("img",)
    preprocessing = "that of the program which computed the features"

    def __init__(self, name: str) -> None:
        self.name, self.folder = name, Path(name.removeprefix(FEATURES))
        files = sorted(self.folder.glob("**/*.safetensors"))
        if not files:
            raise DataError(f"{name}: there is no NAME.safetensors of a data set in this folder")
        self.digest = digest_of({str(file.relative_to(self.folder)): digest_file(file) for file in files})
        scales = [float(found["scale"]) for found in map(read_safetensors, files) if "scale" in found]
        self.scale = scales[0] if scales else None

    def images(self, part: Part, view: str = "img") -> ImageRows:
        assert view == "img", "there are no frozen towers beside stored features"
        rows = self._tensor(part, f"{part.label}/image", len(part.source))
        return ImageRows(unit(rows), torch.arange(len(rows)))

    def captions(self, part: Part, samples: Sequence[int]) -> Tensor:
        counts = np.array([len(part.source.record(index).captions) for index in range(len(part.source))])
        rows = self._tensor(part, f"{part.label}/text", int(counts.sum()))
        return unit(rows[rows_of(counts, samples)])

    def texts(self, texts: Sequence[str]) -> Tensor:
        raise DataError(f"{self.name}: stored features have no text encoder, which this task needs")

    def classes(self, part: Part, names: Sequence[str], templates: Sequence[str]) -> Tensor:
        return unit(self._tensor(part, "classes", len(names)))

    def _tensor(self, part: Part, key: str, rows: int) -> Tensor:
        path = self.folder / f"{part.data}.safetensors"
        tensors = read_safetensors(path) if path.is_file() else {}
        if key not in tensors:
            raise DataError(f"{path}: no tensor {key!r}; it holds {', '.join(sorted(tensors)) or 'nothing'}")
        value = tensors[key].float()
        if value.ndim != 2 or len(value) != rows:
            raise DataError(
                f"{path}: {key} is {list(value.shape)}, and the data has {rows:,} of them; one row each is needed"
            )
        check_features(value, f"{path}: {key}")
        return value


def open_features(name: str, folder: Path, device: torch.device | str = "cpu", workers: int = 0) -> Features:
    """The features of what a name means: `features:FOLDER`, or a model as `open_target` takes it."""
    if name.startswith(FEATURES):
        return StoredFeatures(name)
    return TowerFeatures(open_target(name, device), folder, device, workers)


def rows_of(counts: NDArray[np.int64], samples: Sequence[int]) -> Tensor:
    """The rows of some samples, of which each has `counts` rows and which follow one another, int64."""
    first = np.cumsum(counts) - counts
    return torch.from_numpy(np.concatenate([np.arange(first[i], first[i] + counts[i]) for i in samples]))


def is_foreign(name: str) -> bool:
    """Whether a name means a model that is no run of ours, or stored features."""
    return name.startswith(FEATURES) or any(kind.accepts(name) for kind in TARGETS[1:])


def captioned(features: Features, part: Part) -> Encoded:
    """A part's images and captions in the main views; equal images are one, as `encode.encode` makes them.

    Raises DataError for a part without captions.
    """
    rows = features.images(part)
    usable = dict(zip(rows.samples.tolist(), range(len(rows.samples)), strict=True))
    samples = samples_of_images(part.source, merge=True)
    index = [first for first in samples if first in usable]
    texts = texts_of(part.source, index, samples)
    if not texts.captions:
        raise DataError(f"{part.name}: its images have no captions")
    bad = [BadSample(part.source.record(i).id, "damaged image") for i in samples if i not in usable]
    text = features.captions(part, [sample for first in index for sample in samples[first]])
    image = rows.features[torch.tensor([usable[first] for first in index])]
    return Encoded(
        {"img": image, "txt": text}, torch.tensor(texts.rows), torch.tensor(index), texts.captions, bad
    )
