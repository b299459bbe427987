"""A reader of small batches, with crops and flips, and a vocabulary of its own captions."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from threetowers.config import InputConfig
from threetowers.data.loader import BatchReader
from threetowers.data.open import open_source
from threetowers.data.order import Order
from threetowers.data.tokenize import train_tokenizer
from threetowers.data.transforms import ImageSpec

SPEC = ImageSpec(24, (0.5,) * 3, (0.5,) * 3)


def reader(
    path: Path,
    *,
    workers: int = 0,
    live: Mapping[str, ImageSpec] | None = None,
    stores: Mapping[str, Any] | None = None,
) -> BatchReader:
    """Batches of 8 out of what the path holds; live, stores: as of a BatchReader."""
    source = open_source(str(path))
    tokenizer = train_tokenizer(
        (source.record(i).captions[0] for i in range(len(source))), vocab_size=300, context_length=16
    )
    inputs = InputConfig(workers=workers, crop_scale=(0.3, 1.0), flip=True)
    return BatchReader(
        source, Order(0, len(source), 8), tokenizer, inputs, image=SPEC, live=live, stores=stores
    )
