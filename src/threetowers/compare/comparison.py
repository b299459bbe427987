"""Which method wins on this data: trains and evaluates several methods on equal terms, and writes compare.json."""

import json
from pathlib import Path
from typing import Any

from threetowers.compare.figures import collect
from threetowers.compare.runs import train_all
from threetowers.config import CompareConfig, RunConfig
from threetowers.errors import UsageError
from threetowers.files import write_whole


def compare(
    config: RunConfig, options: CompareConfig, out: Path, *, max_minutes: float = 0.0, jobs: int = 1
) -> dict[str, Any] | None:
    """Runs the comparison in `out` and returns the contents of compare.json; None when it was stopped on request.

    config: what the runs share; its third towers are compared one by one, under their names. max_minutes: stop after
    this long, to be continued later; 0 sets no limit. jobs: runs that train at a time. More than one are processes of
    their own, which import the calling script; 0 takes what a short trial finds fastest. Raises UsageError for a
    comparison that cannot be run, and whatever training raises.
    """
    if not 0 <= options.margin < 1:
        raise UsageError(
            f"compare: --margin {options.margin:g} is a share of R@1, from 0 to below 1; 0.02 is 2 points"
        )
    trained = train_all(config, options, out, max_minutes=max_minutes, jobs=jobs)
    if trained is None:
        return None
    result = collect(config, options, *trained, out)
    write_whole(out / "compare.json", json.dumps(result, indent=1, ensure_ascii=False))
    return result
