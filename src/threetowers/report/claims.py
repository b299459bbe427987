"""The claims of a comparison in words, for the terminal, the page and docs/claims.md."""

import math
from collections.abc import Sequence
from typing import Any

from threetowers.objective.pairs import METHODS

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
    "not held": "The 95 % interval of a difference lies on the other side of its bound: the opposite of the "
    "claim holds. p is that of the claim, and is near 1 there.",
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


def certainty_in_words(claim: dict[str, Any]) -> str:
    """As `certainty`, with what a p says that speaks against the claim.

    p is that of the claimed side alone, so that a difference that is clearly on the other side has a p of 1.
    """
    figures = certainty(claim)
    if not figures:
        return ""
    figures = figures.replace("p ", "p of the claim ", 1) if claim["p"] >= 0.995 else figures
    if claim["verdict"] == "not held":
        return f"the opposite holds: an interval lies on the other side of its bound; {figures}"
    return f"{figures}: a difference is not on the claimed side" if _astray(claim) else figures


def _astray(claim: dict[str, Any]) -> bool:
    """Whether a mean is, as it is shown, not on the claimed side of its bound."""
    signs = ((test["mean"] - test["bound"], 1 if test["side"] == "above" else -1) for test in claim["tests"])
    return any(round(1000 * sign * value) <= 0 for value, sign in signs)


def sentence(claim: dict[str, Any]) -> str:
    """The claim, its verdict, and in brackets what that rests on."""
    shown, tested = evidence(claim), bool(claim["tests"])
    alone = len(shown) == 1 and tested
    parts = [words if alone else f"{what} {words}" if tested else f"{words} {what}" for what, words in shown]
    grounds = (", " if alone else "; ").join(filter(None, (*parts, certainty_in_words(claim), claim["note"])))
    return f"{title(claim)}: {claim['verdict']}" + (f" ({grounds})" if grounds else "")


def counted(claims: Sequence[dict[str, Any]]) -> str:
    """`12 claims: 3 held, 1 not held, 5 not shown, 3 not tested`."""
    numbers = {name: sum(claim["verdict"] == name for claim in claims) for name in VERDICTS}
    listed = ", ".join(f"{number} {name}" for name, number in numbers.items() if number)
    return f"{len(claims)} claim{'s' if len(claims) > 1 else ''}: {listed}"


def untested(claims: Sequence[dict[str, Any]]) -> str:
    """The claims that were not tested, each with what it lacks, in one line; empty where all were."""
    lacking = []
    for each in claims:
        if each["verdict"] == "not tested":
            why = "; ".join(filter(None, (each["note"], _remedy(each))))
            lacking.append(f"{title(each)} ({why})" if why else title(each))
    return "; ".join(lacking)


def _remedy(claim: dict[str, Any]) -> str:
    """What would test a claim, by the note that says what it lacks; empty where no option does."""
    missing, _, lacks = claim["note"].partition(" was not ")
    if claim["id"] == "C5" or missing.endswith("-twice"):
        return "`threetowers reproduce` tests it"
    if missing.startswith("zero_shot/"):
        return "--classes tests it"
    if missing.startswith("control/"):
        return "--methods baseline lit tests it"
    named = [name for name, entry in METHODS.items() if entry.label == missing and lacks]
    return f"--methods {named[0]} tests it" if named else ""


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


def signed(value: float) -> str:
    """A number with its sign and one decimal: `+9.1`, `−3.4`; what rounds to 0 has no sign."""
    text = f"{value:+.1f}"
    return "0.0" if float(text) == 0 else text.replace("-", "−")


def _difference(test: dict[str, Any]) -> str:
    mean = f"{signed(100 * test['mean'])} {test['unit']}"
    if test["low"] is None or test["high"] is None:
        return f"{mean}, no interval"
    over = " over queries" if test["over"] == "queries" else ""
    low, high = (signed(100 * test[end]).lstrip("+") for end in ("low", "high"))
    return f"{mean}, 95 %{over} {low} to {high}"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"= {value:.2g}"
