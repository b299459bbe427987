"""Prompts to begin with in the view of classes, which resemble the captions that the models have read."""

from collections.abc import Sequence
from statistics import median

from threetowers.evaluate.zero_shot import DEFAULT_TEMPLATES

SHORT = 5
"""Words that captions have in the median at most where they name a thing and say no more."""
_READ = 1_000  # captions


def templates(given: Sequence[str], captions: Sequence[str]) -> list[str]:
    """Prompts with `{}` for the class name, the one that fits the data best first.

    given: prompts that come with the data; the first of them leads. Without any it is the form of short captions, such
    as `A {}.`, and the usual prompt where captions are longer or missing. The usual prompt and the bare name follow.

    >>> templates([], ["A flower.", "An iris.", "The letter l."])
    ['A {}.', 'a photo of a {}.', '{}']
    """
    first = given[0] if given else _form(captions[:_READ])
    return list(dict.fromkeys([first, *DEFAULT_TEMPLATES, "{}"]))


def _form(captions: Sequence[str]) -> str:
    if not captions or median(len(caption.split()) for caption in captions) > SHORT:
        return DEFAULT_TEMPLATES[0]

    def most(count: int) -> bool:
        return 2 * count > len(captions)

    first = [caption.split()[0] for caption in captions]
    article = ""
    if most(sum(word.lower() in ("a", "an") for word in first)):
        article = "A " if most(sum(word[0].isupper() for word in first)) else "a "
    return f"{article}{{}}{'.' if most(sum(caption.endswith('.') for caption in captions)) else ''}"
