"""Models whose answers are known: oracles, and those that guess."""

from collections.abc import Sequence
from zlib import crc32

import torch
from torch import Tensor

from threetowers.data.repeats import text_groups
from threetowers.evaluate.suite.features import ImageRows, Part
from threetowers.objective.losses import unit


class KnownFeatures:
    """Features of an encoder that knows everything (1), something, or nothing (0) about what it encodes.

    An image and its captions share the vector of the first caption, a class and its images that of the class.
    """

    views: Sequence[str] = ("img",)
    preprocessing = "none"

    def __init__(self, knowledge: float, width: int = 64, scale: float = 20.0) -> None:
        self.knowledge, self.width = knowledge, width
        self.name, self.digest = f"knows {knowledge:g}", f"known{knowledge:g}"
        self.scale: float | None = scale

    def _vectors(self, numbers: Sequence[int]) -> Tensor:
        return torch.stack(
            [torch.randn(self.width, generator=torch.Generator().manual_seed(n)) for n in numbers]
        )

    def _noisy(self, exact: Tensor, seed: int) -> Tensor:
        noise = torch.randn(exact.shape, generator=torch.Generator().manual_seed(seed))
        return unit(self.knowledge * unit(exact) + (1 - self.knowledge) * unit(noise))

    def _numbers(self, part: Part) -> list[int]:
        records = [part.source.record(index) for index in range(len(part.source))]
        if records[0].label is not None:
            return [10_000 + (record.label or 0) for record in records]
        return [int(group) for group in text_groups([record.captions[0] for record in records])]

    def images(self, part: Part, view: str = "img") -> ImageRows:
        return ImageRows(
            self._noisy(self._vectors(self._numbers(part)), crc32(part.name.encode())),
            torch.arange(len(part.source)),
        )

    def captions(self, part: Part, samples: Sequence[int]) -> Tensor:
        numbers = self._numbers(part)
        own = [numbers[sample] for sample in samples for _ in part.source.record(sample).captions]
        return self._noisy(self._vectors(own), 2)

    def texts(self, texts: Sequence[str]) -> Tensor:
        raise NotImplementedError

    def classes(self, part: Part, names: Sequence[str], templates: Sequence[str]) -> Tensor:
        return unit(self._vectors([10_000 + label for label in range(len(names))]))
