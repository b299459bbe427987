"""Finds the columns of a Hugging Face dataset that hold images, captions and labels."""

import random
from pathlib import Path
from typing import Any

from threetowers.data.formats.columns import Captions, usual_image_column
from threetowers.data.source import ColumnNames
from threetowers.errors import UsageError
from threetowers.settings import did_you_mean

_NUM_SAMPLED = 1000  # rows that columns are recognised by


def find_dataset_columns(
    place: Path, rows: Any, columns: ColumnNames, split: str | None
) -> tuple[str, tuple[str, ...], str, str]:
    """The columns of images, captions and labels, and a note. Either captions or the label column are empty."""
    import datasets

    features = dict(rows.features)
    listed = ", ".join(f"{name} ({type(feature).__name__})" for name, feature in features.items())
    for column in columns.captions if columns.image is None else (columns.image, *columns.captions):
        if column not in features:
            raise UsageError(f"{place}: there is no column `{column}`{did_you_mean(column, features)}")
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    images = images or [name for name, feature in features.items() if holds_bytes(feature)]
    if columns.image is not None:
        images = [name for name in images if name == columns.image]
    elif len(images) > 1 and (usual := usual_image_column(images)):
        images = [usual]
    if len(images) != 1:
        raise UsageError(
            f"{place}: {len(images)} columns of type Image can be meant. Name one as image_column. "
            f"Its columns: {listed}"
        )
    names = [name for name in features if name not in (images[0], split) and _is_text(features[name])]
    chosen = sorted(random.Random(0).sample(range(rows.num_rows), min(rows.num_rows, _NUM_SAMPLED)))
    sampled = rows.select_columns(names).select(chosen) if names else None
    texts = Captions(place, sampled.with_format("arrow")[:].to_pydict() if sampled else {})
    if captions := columns.captions or texts.by_name():
        return images[0], captions, "", texts.note(captions)
    for name, feature in features.items():
        if isinstance(feature, datasets.ClassLabel) and name != split:
            return images[0], (), name, ""
    if captions := texts.by_content():
        return images[0], captions, "", texts.note(captions)
    raise UsageError(f"{place}: no column holds captions. Name it as caption_columns. Its columns: {listed}")


def holds_bytes(feature: Any) -> bool:
    """Whether a feature can be an encoded image: bytes, or an object with them, as dataset hubs publish it."""
    if isinstance(feature, dict):
        feature = feature.get("bytes")
    return getattr(feature, "dtype", None) in ("binary", "large_binary")


def _is_text(feature: Any) -> bool:
    """Whether a feature is a string, or a list or an object with strings."""
    if isinstance(feature, dict):
        return any(map(_is_text, feature.values()))
    if isinstance(feature, list):
        return bool(feature) and _is_text(feature[0])
    inner = getattr(feature, "feature", None)
    if inner is not None:
        return _is_text(inner)
    return getattr(feature, "dtype", None) in ("string", "large_string") or hasattr(feature, "languages")
