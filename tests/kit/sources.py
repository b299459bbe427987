"""What a source holds, and what holds for every source."""

import pickle
from collections import Counter

import pytest

from threetowers.data.decode import decode
from threetowers.data.source import Source, describe


def captions(source: Source) -> dict[str, tuple[str, ...]]:
    """The captions of every record by its id."""
    return {record.id: record.captions for record in map(source.record, range(len(source)))}


def content(source: Source) -> list[tuple[object, bytes]]:
    """Every record with its encoded image."""
    return [(source.record(i), source.image(i)) for i in range(len(source))]


def reasons(source: Source) -> Counter[str]:
    """How often each reason stands among the problems."""
    return Counter(problem.reason for problem in source.problems)


def assert_is_a_source(source: Source) -> None:
    """The contract of a source without problems: ids, captions or labels, images, copies, fingerprint, bounds."""
    assert len(source) > 0
    assert not source.problems
    records = [source.record(i) for i in range(len(source))]
    assert len({record.id for record in records}) == len(source)
    for i, record in enumerate(records):
        assert record.captions or record.label is not None
        assert record.label is None or 0 <= record.label < len(source.class_names)
        assert decode(source.image(i), record.id).mode == "RGB"
    copy = pickle.loads(pickle.dumps(source))
    assert content(copy) == content(source) and copy.fingerprint == source.fingerprint
    assert records[0].id in describe(source)
    with pytest.raises(IndexError):
        source.record(len(source))
