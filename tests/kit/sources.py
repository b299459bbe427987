"""What a source holds."""

from collections import Counter

from threetowers.data.source import Source


def captions(source: Source) -> dict[str, tuple[str, ...]]:
    """The captions of every record by its id."""
    return {record.id: record.captions for record in map(source.record, range(len(source)))}


def content(source: Source) -> list[tuple[object, bytes]]:
    """Every record with its encoded image."""
    return [(source.record(i), source.image(i)) for i in range(len(source))]


def reasons(source: Source) -> Counter[str]:
    """How often each reason stands among the problems."""
    return Counter(problem.reason for problem in source.problems)
