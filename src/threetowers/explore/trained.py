"""Which images of the page a run was trained on, by the parts that its data are split into again."""

from collections.abc import Sequence
from pathlib import Path

from threetowers.config import RunConfig
from threetowers.data.source import Source, Subset
from threetowers.errors import BadSample, ThreeTowersError
from threetowers.run.setup import open_data


def trained_on(
    source: Source, data: str | None, runs: Sequence[tuple[RunConfig, str]]
) -> frozenset[int] | None:
    """The samples of a source that at least one of the runs was trained on; None where that is not known.

    data: the path that the source was opened from, or None for a part of the runs' own data; runs of another path do
    not count. runs: settings, and the fingerprint of the training data that the run has written. It is known where the
    source and the training part choose from one collection, and where the data have not changed since the training.
    """
    found: set[int] = set()
    same = False
    origin, places = _origin(source)
    for config, fingerprint in runs:
        if data is not None and (config.data is None or Path(config.data).resolve() != Path(data).resolve()):
            continue
        try:
            train = open_data(config)[0]
        except (ThreeTowersError, BadSample, OSError):
            return None
        train_origin, trained = _origin(train)
        if train.fingerprint != fingerprint or train_origin.fingerprint != origin.fingerprint:
            return None
        same = True
        chosen = set(trained)
        found |= {i for i, place in enumerate(places) if place in chosen}
    return frozenset(found) if same else None


def _origin(source: Source) -> tuple[Source, Sequence[int]]:
    """The collection that a source chooses from, and the place there of each of its samples."""
    places: Sequence[int] = range(len(source))
    while isinstance(source, Subset):
        indices = source.indices
        places = [indices[i] for i in places]
        source = source.source
    return source, places
