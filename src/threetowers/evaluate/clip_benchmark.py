"""Results in the format of CLIP_benchmark, for the tools that read its result files."""

import re
from collections.abc import Mapping
from typing import Any, Literal

from threetowers.errors import UsageError

Task = Literal["zeroshot_retrieval", "zeroshot_classification"]

_CLASSIFICATION = {"top1": "acc1", "top5": "acc5", "mean_per_class": "mean_per_class_recall"}
_DIRECTION = {"t2i": "image_retrieval", "i2t": "text_retrieval"}


def clip_benchmark_result(
    dataset: str, model: str, pretrained: str, task: Task, metrics: Mapping[str, float], language: str = "en"
) -> dict[str, Any]:
    """One result with CLIP_benchmark's keys, ready for `json.dump`; metrics are shares in [0, 1], as in its files.

    metrics: what `retrieval.recalls` or `zero_shot.accuracy` returns. CLIP_benchmark names retrieval by what is
    retrieved: `image_retrieval_recall@k` is text→image. `mean_r@1` has no counterpart there and is left out.
    Raises UsageError for a metric that does not belong to the task.

        clip_benchmark_result("wds/flickr30k", "local-dir:mine", "", "zeroshot_retrieval", recalls(ranks))
    """
    rename = _retrieval_name if task == "zeroshot_retrieval" else _CLASSIFICATION.get
    renamed = {}
    for name, value in metrics.items():
        if name == "mean_r@1" and task == "zeroshot_retrieval":
            continue
        new = rename(name)
        if new is None:
            raise UsageError(f"metric {name!r} does not belong to task {task!r}, got {', '.join(metrics)}")
        renamed[new] = value
    return {
        "dataset": dataset,
        "model": model,
        "pretrained": pretrained,
        "task": task,
        "metrics": renamed,
        "language": language,
    }


def _retrieval_name(name: str) -> str | None:
    match = re.fullmatch(r"(i2t|t2i)_r@(\d+)", name)
    return f"{_DIRECTION[match[1]]}_recall@{match[2]}" if match else None
