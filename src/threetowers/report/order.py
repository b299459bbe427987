"""Which method of a comparison is best and how sure that is: the headline, and the difference of every two methods."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from threetowers.report.claims import short_budget, signed
from threetowers.report.examples import more
from threetowers.report.tables import (
    Compare,
    Html,
    Key,
    cells,
    html_table,
    join,
    label,
    metric_name,
    num_seeds,
    percent,
    primary,
    ranking,
    row_key,
    tag,
)

MAX_PAIRS = 10
"""Pairs that are all shown; of more, those without the leader are folded."""
MAX_NAMED = 3
"""Methods that the headline names where no winner is clear."""
_EQUAL = 1e-9


@dataclass(frozen=True, slots=True)
class Difference:
    """The primary metric of one method minus that of another, as a fraction, paired by seed.

    low, high: the 95 % t-interval over the seeds; None with one seed. ahead: the seeds in which `first` has more.
    """

    first: Key
    second: Key
    mean: float
    low: float | None
    high: float | None
    ahead: int
    num: int

    @property
    def clear(self) -> bool:
        """Whether the interval excludes 0; equal differences have no spread, and are no test."""
        if self.low is None or self.high is None or self.high - self.low < _EQUAL:
            return False
        return self.low > 0 or self.high < 0


def difference(compare: Compare, first: Key, second: Key) -> Difference | None:
    """The difference of two methods over the seeds that both have; None where they share none.

    The interval is Student's for paired values, as `threetowers.evaluate.statistics.paired_difference` has it.
    """
    a, b = _by_seed(compare, first), _by_seed(compare, second)
    values = np.array([a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())])
    if not len(values):
        return None
    mean, ahead, low, high = float(values.mean()), int((values > 0).sum()), None, None
    if len(values) > 1:
        spread = float(values.std(ddof=1)) if np.ptp(values) >= _EQUAL else 0.0
        half = float(stats.t.ppf(0.975, len(values) - 1)) * spread / len(values) ** 0.5
        low, high = mean - half, mean + half
    return Difference(first, second, mean, low, high, ahead, len(values))


def differences(compare: Compare) -> list[Difference]:
    """Every two methods, in the order of the ranking: those with the leader first."""
    keys = _ranked(compare)
    pairs = ((a, b) for place, a in enumerate(keys) for b in keys[place + 1 :])
    return [found for a, b in pairs if (found := difference(compare, a, b))]


def _ranked(compare: Compare) -> list[Key]:
    table, path = cells(compare), primary(compare)
    return [key for key in ranking(compare) if path in table[key]]


def _by_seed(compare: Compare, key: Key) -> dict[int, float]:
    return {
        row["seed"]: row["value"]
        for row in compare.get("results", [])
        if row_key(row) == key and f"{row['task']}/{row['metric']}" == primary(compare)
    }


def headline(compare: Compare) -> tuple[str, str]:
    """Which method is best by the primary metric, and how certain that is: two texts.

    The best method "wins" when its paired differences to all others exclude 0 over several seeds. With one seed it at
    most "leads", when the intervals do not overlap. Otherwise there is no clear winner, and the texts name the methods
    between which the runs do not decide. After too few passes over the data the first text says that instead.
    """
    table, path, ranked = cells(compare), primary(compare), _ranked(compare)
    if not ranked:
        return f"No method has a result for {metric_name(path)} yet.", ""
    where = f" on {compare['data']}" if compare.get("data") else ""
    first, metric = table[ranked[0]][path], metric_name(path)
    figures = [f"{label(compare, key)} {percent(table[key][path].mean)} %" for key in ranked]
    if len(ranked) == 1:
        return f"{label(compare, ranked[0])} is the only method{where}: {percent(first.mean)} % {metric}.", ""
    short, rivals = short_budget(compare), _rivals(compare, ranked)
    if rivals:
        named = [figures[0], *(figures[ranked.index(key)] for key in rivals)]
        left = len(named) - MAX_NAMED
        listed = ", ".join(named[:MAX_NAMED]) + (f" and {left} more" if left > 0 else "")
        needed = "more seeds or more test data" if num_seeds(compare) > 1 else "more seeds"
        what = f"o clear winner{where}: {listed} {metric}; {needed} could decide."
        what = f"there is n{what}" if short else f"N{what}"
    else:
        verb = "wins" if num_seeds(compare) > 1 and not short and _paired(compare, ranked) else "leads"
        runner_up = f"{percent(table[ranked[1]][path].mean)} % for the runner-up {label(compare, ranked[1])}"
        best = f"{label(compare, ranked[0])} {verb}{where}: {percent(first.mean)} % {metric}"
        what = f"{best}, against {runner_up}."
    certainty = _certainty(compare, ranked, rivals)
    return (short, f"After these steps {what} {certainty}") if short else (what, certainty)


def _paired(compare: Compare, ranked: Sequence[Key]) -> Difference | None:
    """The leader's difference to the runner-up over several seeds; None where these are not known."""
    found = difference(compare, ranked[0], ranked[1])
    return found if found and found.num > 1 else None


def _apart(compare: Compare, first: Key, second: Key) -> bool | None:
    """Whether the intervals of two methods do not overlap; None when one is not known."""
    path, table = primary(compare), cells(compare)
    low, high = table[first][path].low, table[second][path].high
    return None if low is None or high is None else low > high


def _rivals(compare: Compare, ranked: Sequence[Key]) -> list[Key]:
    """The methods that the runs do not tell from the leader."""
    rivals = []
    for key in ranked[1:]:
        found = difference(compare, ranked[0], key)
        told = found.clear if found and found.num > 1 else _apart(compare, ranked[0], key) is not False
        rivals += [] if told else [key]
    return rivals


def _certainty(compare: Compare, ranked: Sequence[Key], rivals: Sequence[Key]) -> str:
    """What the runs say about the order of the leader and its next rival, or else the runner-up."""
    leader, other = ranked[0], rivals[0] if rivals else ranked[1]
    found, count = difference(compare, leader, other), num_seeds(compare)
    if found is None or found.low is None or found.high is None:
        apart, table = _apart(compare, leader, other), cells(compare)
        a, b = (table[key][primary(compare)].interval for key in (leader, other))
        state = (
            "are not known" if apart is None else f"{'do not overlap' if apart else 'overlap'} ({a} and {b})"
        )
        if count > 1:
            return f"The 95 % intervals over {count} seeds {state}."
        return (
            f"One seed: the 95 % intervals, a bootstrap over test queries, {state}; "
            "they do not include the variation between training runs."
        )
    names = [label(compare, key) for key in (leader, other)]
    text = (
        f"Over {found.num} seeds {names[0]} is {abs(100 * found.mean):.1f} points "
        f"{'above' if found.mean >= 0 else 'below'} {names[1]}, 95 % {_between(found)}, and ahead in {found.ahead} of "
        f"{found.num} seeds."
    )
    if found.high - found.low < _EQUAL:
        text += " All seeds give the same difference, which is no test."
    below = [label(compare, key) for key in ranked[1:] if key not in rivals]
    if rivals and below:
        text += f" Clearly below {names[0]}: {', '.join(below)}."
    return text


def _between(found: Difference) -> str:
    """The interval in points; empty where there is none."""
    if found.low is None or found.high is None:
        return ""
    return f"{signed(100 * found.low).lstrip('+')} to {signed(100 * found.high).lstrip('+')}"


def how_sure(compare: Compare) -> Html | None:
    """The difference of every two methods with its interval and what it says; None without two methods."""
    found = differences(compare)
    if not found:
        return None
    several = any(each.num > 1 for each in found)
    metric = metric_name(primary(compare))
    if several:
        note = (
            f"Differences in {metric} are in points and paired by seed, because the methods of one seed share the "
            "order of the data. Below each is its 95 % t-interval over the seeds; one that excludes 0 tells the two "
            "methods apart. The intervals are not corrected for the number of pairs: of twenty pairs of equal methods "
            "one would look different."
        )
    else:
        note = (
            f"Differences in {metric} are in points. One seed gives them no interval, so that none is told from "
            "chance: --seeds 0 1 2 adds two."
        )
    shown = found if len(found) <= MAX_PAIRS else [each for each in found if each.first == found[0].first]
    folded = _table(compare, found) if len(shown) < len(found) else None
    return join(
        _table(compare, shown),
        more(f"All {len(found)} pairs", folded) if folded else None,
        tag("p", note, class_="muted"),
    )


def _table(compare: Compare, found: Sequence[Difference]) -> Html:
    rows = []
    for each in found:
        first, second = label(compare, each.first), label(compare, each.second)
        between = tag("small", _between(each)) if each.num > 1 else None
        better = first if each.mean > 0 else second
        says = tag("b", f"{better} is better") if each.clear else "undecided"
        ahead = tag("small", f"first ahead in {each.ahead} of {each.num} seeds")
        rows.append(
            [
                f"{first} against {second}",
                join(signed(100 * each.mean), between),
                tag("div", says, ahead if each.num > 1 else None, class_="words"),
            ]
        )
    return html_table(["pair of methods", "difference, points", "what that says"], rows)
