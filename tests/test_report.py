"""The report: readable from any compare folder, offline, safe with foreign text, the same bytes each time."""

import json
import math
import random
import sys
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from threetowers.report.page import write_report

COLOURS = ("red", "orange", "gold", "green", "cyan", "blue", "purple", "pink")
SHAPES = ("circle", "ring", "square", "triangle", "star")
SKILL = {"baseline": 0.42, "lit": 0.47, "lit-unlocked": 0.5, "3t": 0.56, "3t-regression": 0.53}
NAMES = {
    "baseline": "baseline", "lit": "LiT", "lit-unlocked": "LiT unlocked", "3t": "3T", "3t-regression": "3T regression",
}  # fmt: skip
METRICS = [
    *(("retrieval", f"{way}_r@{k}") for way in ("i2t", "t2i", "mean") for k in (1, 5, 10)),
    *(("zero_shot", name) for name in ("top1", "top5", "mean_per_class")),
]
NASTY = "<script>alert(1)</script> a \"red\" & 'small' <b>circle</b>"


def thumbnail(path: Path, index: int) -> str:
    image = Image.new("RGB", (32, 32), ("#c8dcc0", "#e8ddc4", "#eef1f6", "#cfe0ee")[index % 4])
    draw, x = ImageDraw.Draw(image), 4 + index % 7
    (draw.ellipse if index % 2 else draw.rectangle)((x, 6, x + 18, 24), fill=COLOURS[index % 8])
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return f"images/{path.name}"


def caption(index: int) -> str:
    return f"a large {COLOURS[index % 8]} {('square', 'circle')[index % 2]} on {('grass', 'sand', 'snow')[index % 3]}"


def make_compare(folder: Path, seeds: tuple[int, ...] = (0, 1, 2)) -> dict[str, Any]:
    """A plausible compare folder with every part: five methods, two third towers, thumbnails, logs."""
    rng = random.Random(0)
    images = [thumbnail(folder / f"images/t{i}.png", i) for i in range(24)]
    rows = [("baseline", "")] + [(m, t) for t in ("matched", "mismatched") for m in NAMES if m != "baseline"]
    skill = {(m, t): SKILL[m] - (0.0 if t != "mismatched" else 0.16 if "lit" in m else 0.04) for m, t in rows}
    labels = {(m, t): NAMES[m] + (f" ({t})" if t else "") for m, t in rows}
    methods, results, summary, runs, per_class = [], [], [], [], []
    for (m, t), level in skill.items():
        seconds, params = 60 + 40 * rng.random(), 1_150_000 if "lit" not in m else 2_400_000
        methods.append({
            "method": m, "third": t, "label": labels[m, t], "lr": 0.001, "trainable_params": params - (m == "lit") * 1_900_000,
            "lr_trials": {"0.0005": level - 0.05, "0.001": level, "0.002": level - 0.02}, "inference_params": params,
            "third_at_inference": m == "lit", "train_seconds": seconds, "examples_per_second": 9e4 / seconds,
            "inference_images_per_second": 3000.0 if "lit" not in m else 1400.0,
        })  # fmt: skip
        for task, metric in METRICS:
            base = level + 0.25 * ("5" in metric) + 0.35 * ("10" in metric) + 0.02 * metric.startswith("i2t")
            values = [min(1.0, base + rng.gauss(0, 0.008)) for _ in seeds]
            results += [{"method": m, "third": t, "seed": s, "task": task, "metric": metric, "value": v}
                        for s, v in zip(seeds, values, strict=True)]  # fmt: skip
            mean, half = sum(values) / len(values), 0.02 + 0.005 * rng.random()
            summary.append({"method": m, "third": t, "task": task, "metric": metric, "mean": mean, "low": mean - half,
                            "high": mean + half, "num_seeds": len(seeds), "best": False})  # fmt: skip
        for seed in seeds:
            path = f"runs/{m}-{t or 'none'}-seed{seed}-lr0.001"
            runs.append({"method": m, "third": t, "seed": seed, "lr": 0.001, "path": path})
            write_metrics(folder / path, m, level, rng)
        per_class += [{"method": m, "third": t, "class": f"{c} {s}", "value": min(1.0, max(0.0, rng.gauss(level, 0.2)))}
                      for c in COLOURS for s in SHAPES]  # fmt: skip
    runs.append({"method": "3t", "third": "matched", "seed": 0, "lr": 0.002, "path": "runs/a-trial"})
    alphas = [i / 20 for i in range(21)]
    combination = [
        combined(third, seed, alphas, 0.54, skill["lit", third], rng)
        for third in ("matched", "mismatched")
        for seed in seeds
    ]
    for third in ("matched", "mismatched"):
        mean = max(combination[0]["test"]) - 0.1 * (third == "mismatched")
        summary.append({"method": "3t", "third": third, "task": "combination", "metric": "mean_r@1", "mean": mean,
                        "low": mean - 0.02, "high": mean + 0.02, "num_seeds": len(seeds), "best": False})  # fmt: skip
    for column in {(row["task"], row["metric"]) for row in summary}:
        max((r for r in summary if (r["task"], r["metric"]) == column), key=lambda r: r["mean"])["best"] = (
            True
        )
    compare = {
        "schema": 1, "title": "Which method wins on shapes", "data": "shapes", "created": "2026-01-31T12:00:00",
        "machine": {"cpu": "some CPU", "cores": 2, "device": "cpu", "python": "3.11.7", "torch": "2.10.0"},
        "settings": {"steps": 400, "batch_size": 256, "seeds": list(seeds), "lrs": [0.0005, 0.001, 0.002], "lr_seed": 0,
                     "num_train": 10000, "num_val": 1000, "num_test": 1000, "primary": "retrieval/mean_r@1"},
        "methods": methods, "results": results, "summary": summary, "claims": claims(len(seeds)),
        "combination": combination, "examples": examples(images, labels, rng), "per_class": per_class, "runs": runs,
        "world": [{"image": images[i], "captions": [caption(i), f"{COLOURS[i % 8]} thing"]} for i in range(16)],
    }  # fmt: skip
    save(folder, compare)
    return compare


def write_metrics(run: Path, method: str, level: float, rng: random.Random) -> None:
    run.mkdir(parents=True)
    lines = []
    for step in range(10, 401, 10):
        fall = math.exp(-step / 130)
        row = {"step": step, "seconds": step / 5, "train/loss": 4.0, "train/scale": 14.0,
               "train/loss/img-txt": 5.5 - 3.5 * level * 1.6 * (1 - fall) + rng.gauss(0, 0.05)}  # fmt: skip
        if method.startswith("3t"):
            low = 1.0 if method == "3t-regression" else 5.5
            row |= {f"train/loss/{side}-third": low * (0.45 + 0.55 * fall) for side in ("img", "txt")}
        lines.append(json.dumps(row))
        if step % 50 == 0:
            lines.append(json.dumps({"step": step, "val/mean_r@1": level * (1 - fall) + rng.gauss(0, 0.006)}))
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def combined(
    third: str, seed: int, alphas: list[float], main: float, end: float, rng: random.Random
) -> dict[str, Any]:
    def curve(a: float, b: float, bump: float) -> list[float]:
        shift = rng.gauss(0, 0.004)
        return [a + (b - a) * x + 4 * bump * x * (1 - x) + shift for x in alphas]

    return {
        "third": third, "seed": seed, "metric": "mean_r@1", "alphas": alphas, "val": curve(main, end, 0.05),
        "test": curve(main, end, 0.05), "alpha": 0.4 - 0.05 * (seed % 2), "ends": {"main": main, "third": end},
        "control": {"val": curve(0.42, end, 0.03), "test": curve(0.42, end, 0.03), "alpha": 0.5},
        "references": {"baseline": 0.42, "lit": end},
    }  # fmt: skip


def claims(num_seeds: int) -> list[dict[str, Any]]:
    note = "one seed" if num_seeds == 1 else ""
    return [
        {"id": "C1", "held": True, "text": "Retrieval: 3T above baseline and LiT, with a matched third tower.",
         "figures": {"3T − baseline": "+14.0 points [12.1, 15.9]", "3T − LiT": "+9.1 points [7.2, 11.0]"}, "note": note},
        {"id": "C3", "held": False, "text": "With a mismatched third tower LiT falls below the baseline, 3T does not.",
         "figures": {"3T − baseline": "+9.7 points [8.0, 11.4]", "LiT − baseline": "-10.9 points [-12.9, -8.9]"}, "note": note},
        {"id": "C5", "held": None, "text": "The gap 3T − LiT grows with model size and data.", "figures": {}, "note": ""},
    ]  # fmt: skip


def examples(
    images: list[str], labels: dict[tuple[str, str], str], rng: random.Random
) -> list[dict[str, Any]]:
    found = []
    for n in range(6):
        text_answers, image_answers = [], []
        for (m, t), name in labels.items():
            picks, place = rng.sample([i for i in range(24) if i != n], 5), rng.randrange(7)
            picks[place % 5 if place < 5 else 0] = n if place < 5 else (n + 1) % 24
            row = {"method": m, "third": t, "label": name}
            scored = [(i, 0.7 - 0.04 * rank) for rank, i in enumerate(picks)]
            text_answers.append(
                row
                | {
                    "items": [
                        {"image": images[i], "text": None, "right": i == n, "score": s} for i, s in scored
                    ]
                }
            )
            image_answers.append(
                row
                | {
                    "items": [
                        {"image": None, "text": caption(i), "right": i == n, "score": s} for i, s in scored
                    ]
                }
            )
        found.append(
            {
                "direction": "t2i",
                "query": caption(n),
                "query_image": None,
                "truth": images[n],
                "answers": text_answers,
            }
        )
        found.append(
            {
                "direction": "i2t",
                "query": None,
                "query_image": images[n],
                "truth": caption(n),
                "answers": image_answers,
            }
        )
    return found


def make_bare(folder: Path) -> dict[str, Any]:
    """One seed, no per-class figures, control or examples, and an unfinished run's log with a torn last line."""
    compare = make_compare(folder, seeds=(0,))
    for curve in compare["combination"]:
        curve["control"] = None
    compare |= {"per_class": [], "examples": [], "world": []}
    log = folder / compare["runs"][0]["path"] / "metrics.jsonl"
    log.write_text(log.read_text(encoding="utf-8")[:-900], encoding="utf-8")
    save(folder, compare)
    return compare


def save(folder: Path, compare: dict[str, Any]) -> None:
    (folder / "compare.json").write_text(json.dumps(compare), encoding="utf-8")


if __name__ == "__main__":  # python tests/test_report.py FOLDER: pages to look at
    for kind, make in (("full", make_compare), ("bare", make_bare)):
        print(write_report(Path(sys.argv[1]) / kind) if make(Path(sys.argv[1]) / kind) else "")
