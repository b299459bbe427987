"""The claims of a comparison in words, for the terminal, the page and docs/claims.md."""

import math
from collections.abc import Sequence
from typing import Any

VERDICTS = {
    "held": ("✓", "yes"),
    "not held": ("✗", "no"),
    "not shown": ("?", "unknown"),
    "not tested": ("–", "unknown"),
}
"""The symbol of each verdict, and its class in the page's style."""
MIN_PASSES = 3
"""Passes over the training data below which no winner is named."""
TERMS = {
    "held": "A claim puts differences, paired by seed, on a side of a bound: 0, or minus a margin fixed before the "
    "runs. It is held when a t test over the seeds says so for each of them. p is twice the one-sided p; corrected "
    "by Holm's method for all tests of this page it is below 0.05.",
    "not held": "The 95 % interval of a difference lies on the other side of its bound.",
    "not shown": "The runs do not decide, for example because the seeds are too few. One seed is never a test. Its "
    "interval is a bootstrap over queries.",
}
"""The verdicts, explained."""


def title(claim: dict[str, Any]) -> str:
    """`C3 mismatched: 3T is not worse than …`; a third tower without a name of its own is left out."""
    third = "" if claim["third"] in ("", "third") else f" {claim['third']}"
    return f"{claim['id']}{third}: {claim['text']}"


def evidence(claim: dict[str, Any]) -> list[tuple[str, str]]:
    """The name of each difference, and the difference with its 95 % interval; for an exact claim, the runs counted."""
    if not claim["tests"]:
        return [(name, str(value)) for name, value in claim["details"].items()]
    return [(test["what"], _difference(test)) for test in claim["tests"]]


def certainty(claim: dict[str, Any]) -> str:
    """`5 seeds, p = 0.004, corrected 0.02`; empty where there is no test."""
    if claim["p"] is None:
        return ""
    corrected = _p(claim["p_adjusted"]).removeprefix("= ")
    return f"{claim['tests'][0]['num']} seeds, p {_p(claim['p'])}, corrected {corrected}"


def sentence(claim: dict[str, Any]) -> str:
    """The claim, its verdict, and in brackets what that rests on."""
    shown, tested = evidence(claim), bool(claim["tests"])
    alone = len(shown) == 1 and tested
    parts = [words if alone else f"{what} {words}" if tested else f"{words} {what}" for what, words in shown]
    grounds = (", " if alone else "; ").join(filter(None, (*parts, certainty(claim), claim["note"])))
    return f"{title(claim)}: {claim['verdict']}" + (f" ({grounds})" if grounds else "")


def glance(claims: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Verdicts with what they are about, one a claim; with one seed, claims that are not decided stand together."""
    one_seed = [claim for claim in claims if claim["tests"] and claim["p"] is None]
    if len(one_seed) < 2:
        return [(claim["verdict"], title(claim)) for claim in claims]
    lacking = [claim for claim in claims if claim["verdict"] == "not tested"]
    decided = [(claim["verdict"], title(claim)) for claim in claims if claim not in [*one_seed, *lacking]]
    rows = [
        ("not shown", f"{_counted(one_seed)}: one seed is no test. Five, --seeds 0 1 2 3 4, can be enough"),
        *decided,
    ]
    return [*rows, ("not tested", f"{_counted(lacking)}: this takes further runs")] if lacking else rows


def _counted(claims: Sequence[dict[str, Any]]) -> str:
    """`4 claims of C4 and C5`."""
    ids = list(dict.fromkeys(claim["id"] for claim in claims))
    listed = ids[0] if len(ids) == 1 else f"{', '.join(ids[:-1])} and {ids[-1]}"
    return f"{len(claims)} claim{'s' if len(claims) > 1 else ''} of {listed}"


def terminal_claims(claims: Sequence[dict[str, Any]]) -> list[str]:
    """Every claim in a sentence; where one seed tests nothing, the claims in short, since the page has them in full."""
    rows = glance(claims)
    if len(rows) == len(claims):
        return [sentence(claim) for claim in claims]
    return [f"{text}: {verdict}" for verdict, text in rows]


def short_budget(compare: dict[str, Any]) -> str:
    """What to say of runs that saw the training data less than MIN_PASSES times; empty for longer ones."""
    settings = compare.get("settings", {})
    steps, batch_size, num_train = (settings.get(name) or 0 for name in ("steps", "batch_size", "num_train"))
    seen, enough = steps * batch_size, MIN_PASSES * num_train
    if not seen or seen >= enough:
        return ""
    passes = math.floor(10 * seen / num_train) / 10  # never rounded up to the limit
    return (
        f"No winner can be named yet: each run saw the training data {passes:g} times. Give --steps "
        f"{math.ceil(enough / batch_size)} or more, for {MIN_PASSES} passes."
    )


def _difference(test: dict[str, Any]) -> str:
    mean = f"{100 * test['mean']:+.1f} {test['unit']}"
    if test["low"] is None or test["high"] is None:
        return f"{mean}, no interval".replace("-", "−")
    over = " over queries" if test["over"] == "queries" else ""
    return f"{mean}, 95 %{over} {100 * test['low']:.1f} to {100 * test['high']:.1f}".replace("-", "−")


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"= {value:.2g}"
