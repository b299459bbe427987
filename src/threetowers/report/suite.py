"""The results of a suite as a table: a row for each data set and task, a column for each method."""

from typing import Any

from threetowers.report.tables import (
    Compare,
    Html,
    Key,
    finite,
    html_table,
    join,
    label,
    num_seeds,
    percent,
    ranking,
    row_key,
    tag,
)


def suite(compare: Compare) -> Html | None:
    """Every method's main metric on the data sets of the suite, and the means by group; None without a suite."""
    rows = compare.get("suite", [])
    if not rows:
        return None
    keys = [key for key in ranking(compare) if any(row_key(row) == key for row in rows)]
    cells = {(row["data"], row["task"], row["metric"], row_key(row)): row for row in rows}
    places = list(dict.fromkeys((row["data"], row["task"], row["metric"]) for row in rows))
    body = []
    for place in places:
        found = [cells.get((*place, key)) for key in keys]
        first = next(row for row in found if row is not None)
        body.append([*place, percent(finite(first["chance"])), *_marked(found)])
    head = ["data", "task", "metric", "chance", *(label(compare, key) for key in keys)]
    spread = (
        "Student's t over the seeds" if num_seeds(compare) > 1 else "a bootstrap over images, of one seed"
    )
    note = f"Percent, with 95 % intervals by {spread}. Bold type marks the best of each row, however small its lead is."
    return join(
        html_table(head, body),
        tag("p", note, class_="muted"),
        _differences(compare),
        _means(compare, rows, keys),
    )


def _differences(compare: Compare) -> Html | None:
    """Whether the best method of each row is better than the next; None where there is nothing to compare."""
    sentences = compare.get("suite_differences", [])
    if not sentences:
        return None
    items = join(*(tag("li", sentence) for sentence in sentences))
    return join(tag("h3", "The best method against the next"), tag("ul", items))


def _marked(found: list[dict[str, Any] | None]) -> list[str]:
    """The cells of one row; the highest mean is bold."""
    best = max((row["mean"] for row in found if row is not None), default=None)
    shown = []
    for row in found:
        if row is None:
            shown.append("–")
            continue
        text = percent(finite(row["mean"]))
        if row["low"] is not None and row["high"] is not None:
            text += f" ({percent(max(0.0, row['low']))} to {percent(min(1.0, row['high']))})"
        shown.append(tag("b", text) if row["mean"] == best else text)
    return shown


def _means(compare: Compare, rows: list[dict[str, Any]], keys: list[Key]) -> Html | None:
    """Means over the data sets of each group and task; None where no group has two."""
    values: dict[tuple[str, str], dict[Key, list[float]]] = {}
    for row in rows:
        by_key = values.setdefault((row["group"] or "all", row["task"]), {})
        by_key.setdefault(row_key(row), []).append(row["mean"])
    body = []
    for (group, task), by_key in values.items():
        num = max(len(each) for each in by_key.values())
        if num > 1:
            means = [
                {"mean": sum(by_key[key]) / num, "low": None, "high": None}
                if len(by_key.get(key, ())) == num
                else None
                for key in keys
            ]
            body.append([group, task, str(num), *_marked(means)])
    if not body:
        return None
    head = ["group", "task", "data sets", *(label(compare, key) for key in keys)]
    return join(tag("h3", "Means over data sets"), html_table(head, body))
