"""The study of the claims: its plan, its records, a small one from end to end, and its summary."""

import json
import multiprocessing
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from threetowers.compare import side_by_side
from threetowers.compare.concurrency import Concurrency
from threetowers.compare.towers import OF_OTHER_WIDTHS
from threetowers.errors import DataError, NonFiniteError, UsageError
from threetowers.objective.pairs import METHODS, objective
from threetowers.reproduce import plan, runner, study, tasks
from threetowers.reproduce.plan import FULL, QUICK, Protocol, Unit, chosen_parts, tuning_units, units
from threetowers.reproduce.records import Record, pack, read_record, read_records, unpack, write_record
from threetowers.reproduce.runner import Runner
from threetowers.reproduce.study import learning_rates, reproduce
from threetowers.reproduce.summary import label_of, summary
from threetowers.reproduce.tasks import Places

SMALL = Protocol(
    seeds=(5, 6), few_seeds=(5, 6), own_towers=False, steps=3, growth_steps=2, num_train=64, num_eval=40,
    data_sizes=(32, 64), lrs=(1e-3,), margin=0.02, budgets=(4,), parts=("main",), methods=("baseline", "lit", "3t"),
    thirds=("matched",), smoke=(("batch_size", 16), ("optim.warmup_steps", 1), ("device", "cpu")),
)  # fmt: skip


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are forked from a server that has imported what they need, which saves them seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["threetowers.reproduce.tasks"])
    monkeypatch.setattr(side_by_side, "SPAWN", context)


# The plan


@pytest.mark.parametrize("protocol", [FULL, QUICK], ids=["full", "quick"])
def test_units_have_names_of_their_own_and_settings_that_can_be_run(protocol: Protocol) -> None:
    every = [unit for part in protocol.parts for unit in units(protocol, part)]
    assert len({unit.name for unit in every}) == len(every)
    assert all(re.fullmatch(r"[\w.-]+", unit.name) for unit in every), "they are names of files"
    tuned = {(unit.label, unit.third) for unit in tuning_units(FULL)}
    for unit in every:
        config = unit.config(1e-3, "world", "shapes:matched", "embeddings", {})
        objective(config)  # a table that cannot be built is refused here
        assert config.steps == unit.steps and config.optim.lr == 1e-3 and config.seed == unit.seed
        assert bool(config.third) == METHODS[unit.method].needs_third == bool(unit.third)
        assert unit.tuned in tuned
        assert (unit.seed == protocol.tuning_seed) == (unit.part == "tuning"), (
            "no figure is of the tuning's world"
        )
        if unit.part == "ablations":
            reference = replace(unit, changes=()).config(1e-3, "world", "shapes:matched", "embeddings", {})
            assert config != reference or unit.third in OF_OTHER_WIDTHS


def test_the_study_is_what_the_protocol_says() -> None:
    main = list(units(FULL, "main"))
    assert len(FULL.seeds) == 5 and len(main) == 5 * (1 + 2 * 5 + 3 * 3 + 2)
    growth = list(units(FULL, "growth"))
    assert len(growth) == 5 * 2 * 3 * 3 * 2
    sizes = {unit.size for unit in growth}
    assert sizes == {"small", "medium", "large"} and {unit.num_train for unit in growth} == set(
        FULL.data_sizes
    )
    first = [unit.method for unit in main[: len(FULL.seeds)]]
    assert set(first) == {"baseline"}, "what others are averaged with comes first"


@pytest.mark.parametrize(
    ("only", "parts"),
    [
        ((), FULL.parts), (("C5",), ("tuning", "growth")), (("c1", "C4"), ("tuning", "main")),
        (("ablations", "C6"), ("tuning", "main", "ablations")), (("tuning",), ("tuning",)),
    ],
)  # fmt: skip
def test_claims_and_parts_can_be_asked_for(only: tuple[str, ...], parts: tuple[str, ...]) -> None:
    assert chosen_parts(FULL, only) == parts


def test_a_word_that_is_neither_claim_nor_part_is_named() -> None:
    with pytest.raises(UsageError, match=r"--only: 'C7' needs 'C7', which is not among C1, .*budgets"):
        chosen_parts(FULL, ("C7",))
    with pytest.raises(UsageError, match=r"'C5' needs 'growth'"):
        chosen_parts(QUICK, ("C5",))


# Learning rates


def trial(label: str, lr: float, value: float | None) -> Record:
    settings = {"part": "tuning", "label": label, "third": "", "lr": lr}
    metrics = {} if value is None else {"val/mean_r@1": value}
    return Record(settings, metrics, described={"diverged": "x"} if value is None else {})


def test_the_best_rate_is_chosen_and_an_edge_asks_for_the_next() -> None:
    protocol = replace(FULL, lrs=(1e-3, 2e-3, 4e-3), max_extensions=2)
    inner = [trial("a", lr, value) for lr, value in ((1e-3, 0.1), (2e-3, 0.3), (4e-3, 0.2))]
    assert learning_rates(protocol, inner) == ({("a", ""): 2e-3}, [])
    upper = [trial("b", lr, value) for lr, value in ((1e-3, 0.1), (2e-3, 0.3), (4e-3, 0.4))]
    assert learning_rates(protocol, [*inner, *upper])[1] == [8e-3]
    diverged = [*upper, trial("b", 8e-3, None)]
    assert learning_rates(protocol, diverged) == ({("b", ""): 4e-3}, []), "a trial that diverged counts as 0"
    grown = [*upper, trial("b", 8e-3, 0.5), trial("b", 16e-3, 0.6)]
    assert learning_rates(protocol, grown) == ({("b", ""): 16e-3}, []), "the extensions are used up"
    lower = [trial("c", lr, value) for lr, value in ((1e-3, 0.4), (2e-3, 0.3), (4e-3, 0.2))]
    assert learning_rates(protocol, lower)[1] == [0.5e-3]
    partial = [trial("e", lr, value) for lr, value in ((1e-3, 0.1), (2e-3, 0.3))]
    assert learning_rates(protocol, partial) == ({("e", ""): 2e-3}, []), "the grid itself comes first"
    equal = [trial("d", lr, 0.2) for lr in (1e-3, 2e-3, 4e-3)]
    assert learning_rates(protocol, equal)[0]["d", ""] == 1e-3, "the lowest of equals"


# Records


@given(st.lists(st.booleans(), max_size=70))
def test_packed_hits_come_back(hits: list[bool]) -> None:
    assert unpack(json.loads(json.dumps(pack(np.array(hits, dtype=bool))))).tolist() == hits


def test_a_record_comes_back_and_what_is_none_is_named(tmp_path: Path) -> None:
    record = Record({"part": "main", "seed": 3}, {"retrieval/mean_r@1": 1 / 3}, checks={"ends": True})
    write_record(tmp_path / "deep" / "a.json", record)
    found = read_record(tmp_path / "deep" / "a.json")
    assert found.settings == record.settings and found.checks == record.checks
    assert found.metrics["retrieval/mean_r@1"] == pytest.approx(1 / 3, rel=1e-5)
    assert read_records(tmp_path / "deep") == {"a": found}
    for content in (b"", b"[]", b"{}", b'{"schema": 0}', b'{"schema": 1, "other": 2}', b"\xff"):
        (tmp_path / "bad.json").write_bytes(content)
        with pytest.raises(DataError, match=r"bad\.json: .*delete it"):
            read_record(tmp_path / "bad.json")


# A small study


def test_a_study_runs_stops_continues_and_repeats_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    places = Places(tmp_path, tmp_path / "records", shipped=True)
    assert reproduce(SMALL, places, jobs=2, max_minutes=1e-4) is None, "it stops when its time is over"
    records = reproduce(SMALL, places, jobs=2)
    assert records is not None
    names = {unit.name for unit in units(SMALL, "main")}
    assert set(records) == names and len(names) == 2 * (1 + 2 + 1)
    before = {path: path.stat().st_mtime_ns for path in places.records.iterdir()}
    (places.records / "main-3t-matched-seed5.json").unlink()
    (places.run(Unit("main", "baseline", "baseline", "", 5, 3)) / "features.safetensors").unlink()
    (places.records / "main-lit-matched-seed5.json").unlink()
    capfd.readouterr()
    again = reproduce(SMALL, places, jobs=2)
    assert "2 of 8 runs and 0 third towers are to be made" in capfd.readouterr().out
    assert again is not None
    after = {path: path.stat().st_mtime_ns for path in places.records.iterdir()}
    assert {path.stem for path in after if after[path] != before[path]} <= {
        "main-3t-matched-seed5", "main-lit-matched-seed5", "main-baseline-seed5",
    }  # fmt: skip
    for name, record in records.items():
        assert again[name].metrics == record.metrics, "a unit that is run again has the same figures"
    _check_records(records)
    _check_summary(summary(SMALL, records))
    del records["main-3t-matched-seed6"]
    assert summary(SMALL, records)["claims"] == [], "none is judged while a run is missing"


def _check_records(records: dict[str, Record]) -> None:
    form, lit = records["main-3t-matched-seed5"], records["main-lit-matched-seed5"]
    assert form.checks == {"ends": True, "identical": True, "untouched": True} and lit.checks == {}
    assert form.combination and lit.control and lit.combination is None
    base = records["main-baseline-seed5"].metrics["retrieval/mean_r@1"]
    assert lit.control["ends"] == [base, lit.metrics["retrieval/mean_r@1"]], (
        "the average of these two, as control"
    )
    i2t = unpack(form.hits["i2t"])
    assert i2t.mean() == pytest.approx(form.metrics["retrieval/i2t_r@1"], abs=1e-5) and len(i2t) == 40
    assert {f"{task}/{name}" for task in ("attribute", "probe") for name in ("shape", "layout")} <= set(
        form.metrics
    )
    assert form.settings["lr"] == 1e-3 and form.described["config"]["optim"]["lr"] == 1e-3
    assert form.described["seconds"] > 0 and form.described["machine"]["torch"]
    assert records["main-3t-twice-matched-seed5"].described["config"]["steps"] == 6
    assert form.described["config"]["data"] == "worlds/seed5-64", "no folder of the machine"
    assert not re.search(r'": "/|file:/', json.dumps([vars(record) for record in records.values()]))


def _check_summary(found: dict[str, Any]) -> None:
    assert json.loads(json.dumps(found)) == json.loads(json.dumps(found | {}))
    assert found["progress"] == [{"part": "main", "done": 8, "total": 8}]
    ids = {claim["id"] for claim in found["claims"]}
    assert ids == {"C1", "C2", "C4", "C5", "C6"}
    verdicts = {(c["id"], c["text"][:5]): c["verdict"] for c in found["claims"] if c["id"] == "C6"}
    assert set(verdicts.values()) == {"held"}
    (row,) = (row for row in found["methods"] if row["label"] == "3t")
    assert row["metrics"]["retrieval/mean_r@1"]["num"] == 2 and "control/mean_r@1" in row["metrics"]
    assert {sweep["label"] for sweep in found["sweeps"]} == {"3t", "control"}
    assert {row["name"] for row in found["towers"]} == {"matched"}
    assert found["growth"] == found["ablations"] == found["budgets"] == []


def test_a_training_that_diverges_has_a_record_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*_: Any, **__: Any) -> Any:
        raise NonFiniteError(f"the loss is not finite; see {tmp_path}/runs/x/events.log")

    monkeypatch.setattr(tasks, "train", breaks)
    places = Places(tmp_path, tmp_path / "records", shipped=True)
    unit = Unit("tuning", "3t", "3t", "matched", 0, 3, 1e-3)
    task = tasks.RunTask(places, unit, unit.config(1e-3, "world", "shapes:matched", "e", {}))
    assert task.run().finished
    record = read_record(task.record)
    assert record.diverged and record.metrics == {}
    assert record.described["diverged"] == "the loss is not finite; see runs/x/events.log"
    assert summary(SMALL, {task.name: record})["diverged"] == [task.name]


def test_the_tuning_is_extended_and_later_runs_take_what_it_chose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trials are made up here: the higher the rate, the better, until 8e-3."""
    ran: list[tuple[str, float]] = []

    def pretend(waiting: Any, *_: Any, **__: Any) -> Any:
        for task in list(waiting):
            lr = task.config.optim.lr
            ran.append((task.name, lr))
            value = lr if lr < 8e-3 else 0.0
            settings = {"part": task.unit.part, "label": task.unit.label, "third": task.unit.third, "lr": lr}
            write_record(task.record, Record(settings, {"val/mean_r@1": value}))
            yield task

    monkeypatch.setattr(runner, "side_by_side", pretend)
    monkeypatch.setattr(study, "render_world", lambda *_: None)
    monkeypatch.setattr(
        runner, "choose", lambda jobs, waiting, folder: Concurrency(1, 1, "a test", step_seconds=0.1)
    )
    protocol = replace(SMALL, lrs=(1e-3, 2e-3), parts=("tuning", "main"), methods=("3t",), max_extensions=3)
    places = Places(tmp_path, tmp_path / "records", shipped=True)
    assert reproduce(protocol, places) is not None
    trials = [lr for name, lr in ran if name.startswith("tuning-3t-matched")]
    assert trials == [1e-3, 2e-3, 4e-3, 8e-3]
    assert {lr for name, lr in ran if name.startswith("main-3t")} == {4e-3}


def test_without_a_tuning_the_missing_rate_is_named(tmp_path: Path) -> None:
    protocol = replace(SMALL, lrs=(1e-3, 2e-3))
    places = Places(tmp_path, tmp_path / "records", shipped=True)
    with pytest.raises(
        DataError,
        match="there is no learning rate for 3t matched, baseline, lit matched; the part tuning chooses",
    ):
        study._Study(protocol, places, Runner(tmp_path, 0.0))._tasks(list(units(protocol, "main"))[:4])


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("3t", "3T"), ("3t-twice", "3T, twice the steps"), ("no heads", "no heads"), ("baseline 1000", "baseline 1000"),
        ("lit small 625", "LiT small 625"),
    ],
)  # fmt: skip
def test_labels_are_read_as_people_read_them(label: str, name: str) -> None:
    assert label_of(label) == name


def test_every_part_has_units() -> None:
    assert all(list(units(FULL, part)) for part in plan.PARTS)
