"""Every benchmark runs once at toy size, and leaves JSON with its machine and its rows."""

import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import open_clip
import pytest

from threetowers.errors import UsageError
from threetowers.recipes import PRESETS
from threetowers.reproduce.records import Record, write_record
from threetowers.towers.frozen.built_in import FOLDER
from threetowers.world.write import write_world

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
NO_BENCHMARKS = {"measure", "page", "resume_rivals", "towers"}
"""What they share, the page that they make, and what makes the towers of the package."""
TOY = {
    "accumulate": "--num 4 --micro 2",
    "allocator": "--rounds 1 --batch-size 2",
    "attention": "--rounds 1 --shapes 1",
    "decode": "--sizes 64x48 --images 2 --rounds 1",
    "embed": "--images 8 --batch-size 4 --workers 1 --rounds 1",
    "explore": "--sizes 40 --width 8 --queries 6 --clients 1 2 --rounds 1",
    "loader": "--samples 96 --workers 1 --batch-size 8 --rounds 1",
    "loss": "--num 16 --dim 8 --rounds 1 --errors-at 8 --memory 16",
    "methods": "--batch-size 4 --rounds 1",
    "ranks": "--sizes 200 --width 8 --rounds 1",
    "pieces": "--images 6 --rounds 1 --models test_vit",
    "precision": "--seeds 0 --steps 6 --device cpu",
    "probes": "--train 120 --test 60 --width 8 --classes 4 --rounds 1",
    "processes": "--processes 2 --size 4 --width 8",
    "scale": "--sizes 200 --shard-size 100",
    "search": "--candidates 3000 --queries 20 --width 16 --rounds 1",
    "step": "--batch-size 2 --rounds 1",
    "suite": "--steps 1",
    "store": "--rows 500 --width 8 --batch-size 50 --rounds 1",
}
SLOW = {
    "commits": "--before {src} --steps 4 --only baseline texts",
    "checkpoint": "--rounds 1 --minute 15",
    "busy": "--rounds 1 --seconds 0.1 --works LiT --beside nothing",
    "e2e": "--rounds 1 --seconds 3 --batch-size 8 --samples 512",
    "kept": "--share 0.2 --sets RGBA",
    "quality": "--data {world} --methods baseline --steps 2 --every 1 --lrs 1e-3",
    "jobs": "--rounds 1 --steps 2 --seeds 0",
    "resume": "--quick",
}
NARROW: dict[str, Any] = {
    "embed_dim": 512,
    "vision_cfg": {"image_size": 224, "layers": 1, "width": 64, "patch_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1},
}
"""Towers with the inputs and outputs of ViT-S-32 and ViT-B-32, and one narrow layer."""
pytestmark = pytest.mark.filterwarnings("ignore")  # what the peers warn of is theirs


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/page.py, with the benchmarks' folder on the path of imports."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("page")


def check(path: Path, page: ModuleType) -> None:
    """The JSON has a machine and a table, and its section of the page is the same when it is kept."""
    result = json.loads(path.read_text(encoding="utf-8"))
    assert result["machine"]["cores"] >= 1
    section = page.section(path.stem, result)
    assert "\n| " in section
    assert page.kept_section(path.stem, section) == section


def test_every_benchmark_is_run_here() -> None:
    assert {path.stem for path in BENCHMARKS.glob("*.py")} == {*TOY, *SLOW, *NO_BENCHMARKS, "forecasts"}


@pytest.mark.slow
def test_forecasts_are_judged_by_the_records_of_a_study(
    page: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("forecasts")
    study, records = tmp_path / "study", tmp_path / "records"
    write_world(
        study / "worlds" / "seed7-10000", seed=7, num_train=1_100, num_val=40, num_test=40, num_labelled=0
    )
    shutil.copytree(FOLDER / "matched", study / "towers" / "matched-seed7")
    for place, method in enumerate(module.METHODS):
        third = "" if method == "baseline" else "matched"
        settings = {"part": "main", "label": method, "method": method, "third": third, "seed": 7}
        write_record(records / f"main-{method}.json", Record(settings, {"val/mean_r@1": 0.1 * place}))
    arguments = "--seeds 7 --thirds matched --steps 24 --study {} --records {} --out {}"
    words = arguments.format(study, records, tmp_path / "forecasts.json").split()
    monkeypatch.setattr(sys, "argv", ["forecasts.py", *words])
    module.main()
    found = json.loads((tmp_path / "forecasts.json").read_text(encoding="utf-8"))
    assert [row["full"] for row in found["rows"]] == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert found["comparisons"] == 1 and found["intervals"] == 4
    assert found["winner_named"] == (max(found["rows"], key=lambda row: row["leads"])["method"] == "3t-main")
    check(tmp_path / "forecasts.json", page)
    (records / "main-3t.json").unlink()
    with pytest.raises(UsageError, match="no record of 3t for matched, seed 7"):
        module.main()


@pytest.mark.parametrize("name", TOY)
def test_a_benchmark_runs_at_toy_size(
    name: str, page: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, which has imported most of what it needs, with narrow towers under the models' names."""
    monkeypatch.chdir(tmp_path)
    for model in ("ViT-S-32", "ViT-B-32"):
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, model, NARROW)
    small = partial(write_world, num_train=200, num_val=20, num_test=20)
    monkeypatch.setattr(
        "threetowers.world.write.write_world", lambda folder, **_: small(folder, num_labelled=100)
    )
    module = importlib.import_module(name)
    if name == "precision":
        preset = replace(PRESETS["shapes"](), batch_size=8, log_every_steps=2)
        monkeypatch.setitem(PRESETS, "shapes", lambda: preset)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *TOY[name].split(), "--out", f"{name}.json"])
    main: Callable[[], None] = module.main
    main()
    check(tmp_path / f"{name}.json", page)


def test_the_page_keeps_what_is_not_measured_again(page: ModuleType) -> None:
    text = (BENCHMARKS.parent / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert page.page({}, text) == text, "run benchmarks/page.py"
    rows = [{"contender": "ours", "rows_per_second": 7.0}]
    changed = page.page({"store": {"machine": {"cpu": "fast"}, "rows": rows}}, text)
    assert "Machine: cpu fast" in changed
    assert page.page({}, changed) == changed
    name = "\n## store\n"
    assert changed.partition(name)[0] == text.partition(name)[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_a_benchmark_of_whole_runs_runs_at_toy_size(name: str, page: ModuleType, tmp_path: Path) -> None:
    out, world = tmp_path / f"{name}.json", tmp_path / "world"
    if "{world}" in SLOW[name]:
        write_world(world, num_train=300, num_val=20, num_test=20, num_labelled=0)
    command = [
        sys.executable,
        str(BENCHMARKS / f"{name}.py"),
        *SLOW[name].format(src=BENCHMARKS.parent / "src", world=world).split(),
        "--out",
        str(out),
    ]
    subprocess.run(command, cwd=tmp_path, check=True)
    check(out, page)
