"""The profile of a run: all time in one phase, the same weights, nothing done without it; and the report of a run."""

import gzip
import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from kit.runs import Config, assert_same_weights, at_step, poisoned, with_vit
from test_report import Page
from threetowers import cli
from threetowers.data.loader import Batch, batches
from threetowers.errors import DataError
from threetowers.model import ThreeTowers
from threetowers.report.panels import PALETTE, WIDTH
from threetowers.report.run import write_run_report
from threetowers.run.thirds import Thirds
from threetowers.train import loop, profile
from threetowers.train.loop import train
from threetowers.train.optim import learning_rate
from threetowers.train.profile import PHASES, Profile, no_phase
from threetowers.train.saver import Saver
from threetowers.train.session import return_to_checkpoint

CPU = torch.device("cpu")


class Clock:
    """Stands still until something is said to have taken time, and counts how often it is read."""

    def __init__(self) -> None:
        self.now, self.reads = 0.0, 0

    def perf_counter(self) -> float:
        self.reads += 1
        return self.now

    def takes(self, seconds: float, work: Callable[..., Any]) -> Callable[..., Any]:
        """The work, which takes this long by this clock."""

        def slow(*arguments: Any, **options: Any) -> Any:
            self.now += seconds
            return work(*arguments, **options)

        return slow


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(profile, "time", made)
    return made


def described(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "profile.json").read_text(encoding="utf-8"))
    return values


@pytest.mark.parametrize(("micro", "passes", "backwards"), [(0, 1, 1), (8, 4, 3)])
def test_all_work_of_a_step_counts_in_its_phase(
    micro: int, passes: int, backwards: int,
    tiny_config: Config, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Of 6 steps the last two are measured, and log, validation and checkpoint are in the last one alone."""

    def read(*arguments: Any, **options: Any) -> Iterator[Any]:
        for batch in batches(*arguments, **options):
            clock.now += 1
            yield batch

    monkeypatch.setattr(loop, "batches", read)
    for seconds, owner, name in (
        (2, Thirds, "features"),
        (4, ThreeTowers, "features"),
        (8, ThreeTowers, "loss"),
        (16, torch.autograd, "backward"),
        (32, torch.optim.AdamW, "step"),
        (64, loop, "step_metrics"),
        (256, Saver, "save"),
        (512, loop, "learning_rate"),
        (1024, Batch, "to"),
    ):
        monkeypatch.setattr(owner, name, clock.takes(seconds, getattr(owner, name)))
    monkeypatch.setattr(loop, "validate", clock.takes(128, lambda *_: {}))
    train(tiny_config(micro_batch_size=micro), tmp_path / "run", profile=True)
    found = described(tmp_path / "run")
    assert found["steps"] == {"measured": 2, "warm_up": 3, "traced": 1}
    assert {name: phase["seconds"] for name, phase in found["phases"].items()} == {
        "data": 2 * (1 + 1024 * passes), "third": 2 * 2 * passes, "forward": 2 * 4 * passes, "loss": 2 * 8,
        "backward": 2 * 16 * backwards, "optimiser": 2 * 32, "log": 64, "validation": 128, "checkpoint": 256,
        "other": 2 * 512,
    }  # fmt: skip
    assert found["seconds"] == sum(phase["seconds"] for phase in found["phases"].values())
    assert {name: phase["steps"] for name, phase in found["phases"].items()} == {
        **dict.fromkeys(PHASES, 2), "validation": 1, "checkpoint": 1,
    }  # fmt: skip
    assert found["phases"]["other"]["longest"] == 512
    assert clock.reads > 100


def test_phases_add_up_to_the_time_of_the_steps(tiny_config: Config, tmp_path: Path) -> None:
    began = time.perf_counter()
    train(tiny_config(steps=9), tmp_path / "run", profile=True)
    whole = time.perf_counter() - began
    found = described(tmp_path / "run")
    together = sum(phase["seconds"] for phase in found["phases"].values())
    assert found["seconds"] == pytest.approx(together, rel=1e-9)
    assert 0 < found["seconds"] < whole
    assert all(found["phases"][name]["seconds"] > 0 for name in PHASES)


def test_a_phase_inside_another_takes_its_time_from_it(clock: Clock) -> None:
    each = Profile(CPU, 0, 1)
    with each.phase("validation"):
        clock.now += 1
        with each.phase("forward"):
            clock.now += 3
        clock.now += 1
        with each.phase("loss"):
            clock.now += 4
        clock.now += 5
    clock.now += 7
    each.step_done()
    clock.now += 11  # between two steps
    seconds = {name: phase["seconds"] for name, phase in each.as_dict()["phases"].items() if phase["steps"]}
    assert seconds == {"validation": 7, "forward": 3, "loss": 4, "other": 7}
    assert each.as_dict()["seconds"] == 21


def test_returning_to_a_checkpoint_is_part_of_no_step(
    tiny_config: Config, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "batches", poisoned(set(range(3, 8))))
    monkeypatch.setattr(loop, "learning_rate", clock.takes(1, learning_rate))
    monkeypatch.setattr(loop, "return_to_checkpoint", clock.takes(1000, return_to_checkpoint))
    train(tiny_config(steps=12, checkpoint_every_steps=3), tmp_path / "run", profile=True)
    found = described(tmp_path / "run")
    assert clock.now > 1000
    assert found["seconds"] == found["steps"]["measured"] == 12 + 5 - 3 - found["steps"]["traced"]


@pytest.mark.parametrize("micro", [0, 5])
def test_weights_have_the_same_bits(micro: int, tiny_config: Config, tmp_path: Path) -> None:
    config = with_vit(tiny_config(micro_batch_size=micro, steps=8), patch_dropout=0.5)
    train(config, tmp_path / "without")
    train(config, tmp_path / "with", profile=True)
    assert_same_weights(tmp_path / "without", tmp_path / "with")


def test_without_it_no_clock_is_read_and_nothing_is_made(
    tiny_config: Config, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    for name in ("__init__", "phase", "_timed", "_charge", "step_done", "write"):
        monkeypatch.setattr(Profile, name, lambda *_, name=name: made.append(name))
    result = train(tiny_config(micro_batch_size=8), tmp_path / "run")
    assert (clock.reads, made, result.profile) == (0, [], "")
    assert not list((tmp_path / "run").glob("*profile*")) + list((tmp_path / "run").glob("trace*"))
    assert no_phase("forward") is no_phase("loss"), "one context for all phases"


def test_a_call_that_continues_is_profiled_by_itself(tiny_config: Config, tmp_path: Path) -> None:
    config, folder = tiny_config(steps=9), tmp_path / "run"
    first = train(config, folder, max_minutes=1e-6, profile=True)
    assert first.step == 1 and "nothing is measured" in first.profile
    assert not (folder / "profile.json").exists()
    second = train(config, folder, profile=True)
    found = described(folder)
    assert found["first_step"] == 2 and sum(found["steps"].values()) == 8
    assert "from step 2 on" in second.profile
    again = train(config, folder, profile=True)
    assert again.profile == "" and described(folder) == found, "a finished run has no steps left"
    train(config, folder, fresh=True)
    assert not (folder / "profile.json").exists() and not (folder / "trace.json.gz").exists()


def test_the_trace_names_the_phases(tiny_config: Config, tmp_path: Path) -> None:
    train(tiny_config(steps=7), tmp_path / "run", profile=True)
    with gzip.open(tmp_path / "run" / "trace.json.gz", "rt", encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    names = [event.get("name") for event in events if event.get("cat") == "user_annotation"]
    traced = described(tmp_path / "run")["steps"]["traced"]
    assert traced == 2
    assert {name: names.count(name) for name in ("data", "third", "forward", "loss", "backward")} == {
        "data": 2 * traced, "third": traced, "forward": traced, "loss": traced, "backward": traced,
    }  # fmt: skip
    assert "aten::linear" in [event.get("name") for event in events]


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 16, 17, 23, 24, 1000])
def test_one_step_is_measured_however_short_the_call(steps: int) -> None:
    each = Profile(CPU, 5, 5 + steps)
    assert each._warm_up <= 3 and 0 <= each._num_traced <= 10
    assert each._warm_up + each._num_traced < steps
    assert steps < 24 or each._num_traced == 10


def test_a_run_that_breaks_off_leaves_no_tracer_behind(tiny_config: Config, tmp_path: Path) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with at_step(6, interrupt), pytest.raises(KeyboardInterrupt):  # while steps are traced
        train(tiny_config(steps=30), tmp_path / "broken", profile=True)
    assert not (tmp_path / "broken" / "profile.json").exists()
    assert not torch._C._autograd._profiler_enabled()
    assert train(tiny_config(), tmp_path / "run", profile=True).profile


def test_on_a_gpu_the_clock_is_read_when_the_device_is_done(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wait(device: torch.device) -> None:
        waits.append((device.type, clock.reads))
        clock.now += 1  # what the device had still to do

    waits: list[tuple[str, int]] = []
    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
    each = Profile(torch.device("cuda"), 0, 1)
    with each.phase("forward"):
        pass
    each.step_done()
    assert waits == [("cuda", 0), ("cuda", 1), ("cuda", 2)]
    found = each.as_dict()
    assert found["phases"]["forward"]["seconds"] == 1 and found["device"] == "some GPU"
    assert "each phase waited for the device" in profile.text_table(found)


def test_the_table_is_aligned(tmp_path: Path, clock: Clock) -> None:
    each = Profile(CPU, 0, 1)
    for number, name in enumerate(PHASES):
        with each.phase(name):
            clock.now += 10.0 ** (number - 6)
    each.step_done()
    first, head, *rows, last = each.write(tmp_path).splitlines()
    assert first == "where the time of a step went: 1 steps measured on cpu, from step 1 on"
    assert [row.split()[0] for row in rows] == [*PHASES, "together"]
    assert {len(row) for row in rows[:-1]} == {len(head)} and rows[-1].endswith("100.0%")
    assert last == "not counted: 0 steps to warm up"
    assert "nothing is measured" in Profile(CPU, 1, 3).write(tmp_path)
    assert not (tmp_path / "profile.json").exists(), "the earlier call's would be taken for this one's"


def test_from_the_command_line_to_the_report(
    tiny_config: Config, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = (
        f"train tiny --data {photos} --method baseline --steps 6 --batch-size 16 --inputs.workers 0".split()
    )
    words += ["--inputs.val-fraction", "0.2", "--out", str(tmp_path / "run"), "--profile", "True"]

    def run(words: list[str]) -> tuple[int, str]:
        with pytest.raises(SystemExit) as stop:
            cli.main(words)
        captured = capfd.readouterr()
        return int(stop.value.code or 0), captured.out + captured.err

    code, out = run(words)
    assert code == 0 and re.search(r"^together +[\d.]+ +100.0%$", out, re.MULTILINE), out
    assert "profiler_st" not in out, "torch's tracer is silent"
    code, out = run(words)
    assert code == 0 and "is finished, so no step was taken" in out
    code, out = run(["report", str(tmp_path / "run")])
    assert code == 0 and str(tmp_path / "run" / "report.html") in out
    assert "Where the time of a step went" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    code, out = run(["report", str(tmp_path)])
    assert code == 3 and len(out.splitlines()) == 1 and "config.toml" in out


@pytest.fixture(scope="module")
def shown() -> dict[str, Any]:
    """A profile.json in which no phase has the same share as another, and none is missing but the checkpoint."""
    shares = dict(zip(PHASES, (8.0, 0.001, 30.0, 2.0, 45.0, 6.0, 1.0, 5.0, 0.0, 2.999), strict=True))
    phases = {
        name: {"what": what, "seconds": shares[name] / 10, "longest": 1.0, "steps": 20 * bool(shares[name])}
        for name, what in PHASES.items()
    }
    counts = {"measured": 20, "warm_up": 3, "traced": 10}
    return {"schema": 1, "device": "<b>GPU</b>", "waits_for_device": True, "first_step": 1, "steps": counts,
            "seconds": 10.0, "phases": phases}  # fmt: skip


def page_of(folder: Path, values: dict[str, Any] | str | None) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "config.toml").write_text('method = "3t"\ndata = "a <b>.csv"\nsteps = 33\n', encoding="utf-8")
    (folder / "metrics.jsonl").write_text('{"step": 1, "train/loss/img-txt": 3.0}\n')
    if values is not None:
        (folder / "profile.json").write_text(values if isinstance(values, str) else json.dumps(values))
    return write_run_report(folder).read_text(encoding="utf-8")


def test_the_report_shows_the_split_as_a_bar_and_in_words(tmp_path: Path, shown: dict[str, Any]) -> None:
    page = page_of(tmp_path, shown)
    parsed = Page(page)
    assert not re.search(r"https?:|//[a-z]|@import|<script|<link|<b>", page, re.IGNORECASE)
    (bar,) = [attributes for name, attributes in parsed.tags if attributes.get("class") == "plot split"]
    assert bar["role"] == "img" and "data 8.0, third 0.0, forward 30.0, loss 2.0" in str(bar["aria-label"])
    drawn = re.search(r'<svg class="plot split".*?</svg>', page)
    assert drawn
    rectangles = [attributes for name, attributes in Page(drawn[0]).tags if name == "rect"]
    places = [(float(each["x"] or 0), float(each["width"] or 0)) for each in rectangles]
    assert len(places) == 9, "a phase that did not occur is not drawn"
    assert places[-1][0] + places[-1][1] == pytest.approx(WIDTH, abs=0.1)
    assert all(x + width == pytest.approx(after[0], abs=0.02) for (x, width), after in pairwise(places))
    assert places[4][1] == pytest.approx(0.45 * WIDTH, abs=0.01)
    fills = [re.search(r"var\(--([\w-]+)\)", str(each["style"])) for each in rectangles]
    assert len({fill[1] for fill in fills if fill and fill[1] in PALETTE}) == 9, "each its own colour"
    labels = re.findall(r"<text [^>]*>([a-z]+)</text>", drawn[0])
    assert labels == ["data", "forward", "backward"], "the others have no room below"
    for name, what in PHASES.items():
        assert (what in parsed.text) == (name != "checkpoint"), name
    for figure in ("45.0 %", "225.00", "500.0 ms on <b>GPU</b>", "20 steps", "waited for the device"):
        assert figure in parsed.text, figure


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ("{", "JSONDecodeError"),
        ("[]", "TypeError"),
        ('{"schema": 2}', "schema is 2"),
        ('{"schema": 1}', "KeyError"),
        ('{"schema": 1, "steps": {}, "seconds": "long", "phases": {}}', "no time in seconds"),
    ],
)
def test_a_profile_that_cannot_be_used_is_named(values: str, says: str, tmp_path: Path) -> None:
    text = Page(page_of(tmp_path, values)).text
    assert "Not shown: profile.json" in text and says in text


def test_the_report_of_a_run_without_profile_and_evaluation(tmp_path: Path) -> None:
    text = Page(page_of(tmp_path, None)).text
    assert "3T on a <b>.csv" in text and "This run has no evaluation yet." in text and "loss img-txt" in text
    assert "Where the time" not in text and "Results" not in text


def test_the_report_of_a_run_shows_its_results(tmp_path: Path) -> None:
    tmp_path.joinpath("evaluation.json").write_text(
        json.dumps({"num_test": 40, "test": {"mean_r@1": 0.25, "i2t_r@1": 0.3}, "zero_shot": {"top1": 0.61}})
    )
    text = Page(page_of(tmp_path, None)).text
    assert "25.0 % mean R@1 on 40 test images." in text and "30.0" in text and "61.0" in text


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"config\.toml"):
        write_run_report(tmp_path)
    (tmp_path / "config.toml").write_text("steps =")
    with pytest.raises(DataError, match="cannot be read"):
        write_run_report(tmp_path)
    (tmp_path / "config.toml").write_text("steps = 3")
    (tmp_path / "evaluation.json").write_text("{")
    with pytest.raises(DataError, match="threetowers evaluate"):
        write_run_report(tmp_path)


def test_micro_batches_of_a_live_tower_are_profiled(tiny_config: Config, tmp_path: Path) -> None:
    config = tiny_config(micro_batch_size=8)
    config = replace(config, inputs=replace(config.inputs, third_view="same"))
    train(config, tmp_path / "run", profile=True)
    phases = described(tmp_path / "run")["phases"]
    assert phases["third"]["seconds"] > 0.01 * phases["forward"]["seconds"], "it runs in the step"
