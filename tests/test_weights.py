"""The weights of the rows: each method's own, those given, and those that follow a schedule."""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kit.runs import Config, assert_same_weights, interrupt_at, logged, rows, weights
from threetowers.commands.arguments import TrainArguments, run_arguments
from threetowers.commands.validate import validate
from threetowers.compare.claims import Exact, Measured, claims
from threetowers.compare.comparison import compare
from threetowers.config import CompareConfig, Method, ObjectiveConfig, RunConfig
from threetowers.data.loader import Batch
from threetowers.errors import UsageError
from threetowers.objective import losses
from threetowers.objective.pairs import METHODS, Objective, objective, resolved
from threetowers.objective.weights import Schedule
from threetowers.report.page import write_report
from threetowers.report.run import write_run_report
from threetowers.run.setup import prepare
from threetowers.settings import read_config, write_config
from threetowers.train.guards import differing_keys
from threetowers.train.loop import train
from threetowers.train.step import TrainingStep

THIRD = 1 / 3
MOVING = ObjectiveConfig(
    weights=(0.2, 0.6, 0.2), weights_end=(1.0, 0.0, 0.5), weights_schedule="cosine", weights_steps=(1, 5)
)


def table(
    method: Method = "3t", steps: int = 100, third: Sequence[str] = ("timm:x",), **options: Any
) -> Objective:
    return objective(
        RunConfig(method=method, steps=steps, third=tuple(third), objective=ObjectiveConfig(**options))
    )


@pytest.mark.parametrize(
    ("method", "own"),
    [("3t", (THIRD, THIRD, THIRD)), ("3t-main", (0.6, 0.2, 0.2)), ("3t-regression", (THIRD, THIRD, THIRD))],
)
def test_a_method_has_its_own_weights_unless_others_are_given(method: Method, own: tuple[float, ...]) -> None:
    assert table(method).weights(0) == own
    assert table(method, weights=(0.5, 0.25, 2.0)).weights(0) == (0.5, 0.25, 2.0)
    assert table("baseline", weights=(0.5, 0.25, 2.0)).weights(0) == (1.0,)


def test_the_two_weightings_of_3t_differ_in_nothing_else() -> None:
    one, other = table("3t", weights=(0.5, 0.3, 0.2)), table("3t-main", weights=(0.5, 0.3, 0.2))
    assert one == other and [name for name, method in METHODS.items() if method.is_3t] == ["3t", "3t-main"]


@pytest.mark.parametrize(("kind", "quarter"), [("linear", 0.25), ("cosine", 0.5 - 0.5**1.5)])
def test_a_schedule_at_its_ends_and_between_them(kind: Any, quarter: float) -> None:
    value = partial(Schedule(kind, 10, 50).value, 0.1, 0.7)
    assert [value(step) for step in (0, 10)] == [0.1, 0.1] and [value(step) for step in (50, 90)] == [
        0.7,
        0.7,
    ]
    assert value(30) == pytest.approx(0.4) and value(20) == pytest.approx(0.1 + 0.6 * quarter)
    assert value(40) == pytest.approx(0.7 - 0.6 * quarter)
    sevenths = Schedule(kind, 0, 7).value
    for start, end in ((THIRD, THIRD), (0.1, 0.1), (0.2, 0.9), (0.1, 0.3), (0.7, 0.0)):
        assert sevenths(start, end, 0) == start and sevenths(start, end, 7) == end
        assert start != end or {sevenths(start, end, step) for step in range(9)} == {start}


def test_rows_of_several_third_towers_share_the_weight_of_every_step() -> None:
    two = table(
        third=("a=timm:x", "b=timm:y"),
        weights=(0.2, 0.4, 0.4),
        weights_end=(1, 0, 0.2),
        weights_schedule="linear",
    )
    assert two.weights(0) == pytest.approx((0.2, 0.2, 0.2, 0.2, 0.2))
    assert two.weights(50) == pytest.approx((0.6, 0.1, 0.15, 0.1, 0.15))
    assert two.weights(100) == (1, 0, 0.1, 0, 0.1)


@pytest.mark.parametrize("method", ["baseline", "lit"])
def test_a_method_of_one_row_has_no_schedule(method: Method) -> None:
    single = table(method, weights_end=(0, 1, 0), weights_schedule="linear")
    assert single.schedule is None and single.weights(70) == (1.0,)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weights_end": (1, 0, 0)}, r"objective\.weights_end: \[1, 0, 0\] has no effect .* linear"),
        ({"weights_steps": (0, 9)}, r"objective\.weights_steps: \[0, 9\] has no effect"),
        ({"weights_schedule": "linear"}, r"objective\.weights_end: a linear schedule needs .*--objective"),
        ({"weights_schedule": "cosine", "weights_end": (1, 0)}, r"objective\.weights_end: three .*\[1, 0\]"),
        ({"weights_schedule": "linear", "weights_end": (1, 0, -1)}, r"objective\.weights_end: three finite"),
        ({**vars(MOVING), "weights_steps": (5, 5)}, r"objective\.weights_steps: \[5, 5\] .* the smaller first"),
        ({**vars(MOVING), "weights_steps": (-1, 5)}, r"objective\.weights_steps"),
        ({**vars(MOVING), "weights_steps": (5,)}, r"objective\.weights_steps"),
        ({"weights": (1, 0)}, r"objective\.weights: three"),
        ({"weights": (0, 1, 0), "weights_end": (0, 2, 0), "weights_schedule": "linear"}, "every row with txt"),
    ],
    ids=str,
)  # fmt: skip
def test_weights_and_schedules_that_cannot_be_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        table(**options)


def test_a_tower_must_be_trained_at_some_step_of_the_run() -> None:
    late: dict[str, Any] = {"weights": (0, 1, 0), "weights_end": (1, 0, 0), "weights_schedule": "linear"}
    assert table(**late).weights(0) == (0, 1, 0)
    with pytest.raises(UsageError, match="every row with txt"):
        table(**late, weights_steps=(100, 200))


# one step


def step_of(config: RunConfig, folder: Path) -> tuple[TrainingStep, Batch]:
    setup = prepare(config, folder)
    step = TrainingStep(config, setup.model, setup.device, setup.thirds.features)
    return step, setup.reader()[range(config.batch_size)]


def plain_loss(step: TrainingStep, batch: Batch, weights: Sequence[float]) -> Tensor:
    """The sum of the rows by the formulas that are written to be read."""
    model = step.model
    feats = step.features(batch)
    total = torch.zeros(())
    for index, (row, weight) in enumerate(zip(model.objective.rows, weights, strict=True)):
        a, b, scale = model.view(row.a, feats), model.view(row.b, feats), model.scale(index)
        if row.kind == "softmax":
            value = losses.softmax_loss(a, b, scale)
        elif row.kind == "sigmoid":
            assert model.bias is not None
            value = losses.sigmoid_loss(a, b, scale, model.bias[index])
        elif row.kind == "cosine":
            value = losses.cosine_loss(a, b)
        else:
            value = losses.mse_loss(model.raw_view(row.a, feats), model.raw_view(row.b, feats))
        total = total + weight * value
    return total


@pytest.mark.parametrize("at", [0, 2, 5])
@pytest.mark.parametrize("micro", [0, 7])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("3t", {}),
        ("3t-main", {"kind": "sigmoid", "scale": "per-row"}),
        ("3t-regression", {"regression": "cosine"}),
        ("3t-regression", {"regression": "mse", "kind": "sigmoid"}),
    ],
)
def test_a_step_has_the_loss_and_gradients_of_its_weights(
    method: Method, options: dict[str, Any], micro: int, at: int, tiny_config: Config, tmp_path: Path
) -> None:
    """The last of the schedule's weights has a 0: the gradients of its heads are 0 and not missing."""
    base = tiny_config()
    config = replace(
        base, method=method, micro_batch_size=micro, objective=replace(MOVING, **options),
        optim=replace(base.optim, clip_norm=0.0),
    )  # fmt: skip
    step, batch = step_of(config, tmp_path / "run")
    weights = step.model.objective.weights(at)
    named = {name: p for name, p in step.model.named_parameters() if p.requires_grad}
    expected = plain_loss(step, batch, weights)
    gradients = torch.autograd.grad(expected, list(named.values()))
    result = step(batch, 1e-3, weights=weights)
    assert result.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for (name, parameter), gradient in zip(named.items(), gradients, strict=True):
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        error = (parameter.grad - gradient).norm() / gradient.norm().clamp_min(1e-3)
        assert float(error) < 1e-4, f"{name}: {float(error):.1e}"
    if at == 5:
        unused = named["heads.img@third.weight"].grad
        assert unused is not None and not unused.any()


# runs


def test_a_run_moves_its_weights_logs_them_and_ends_with_others_than_without(
    tiny_config: Config, tmp_path: Path
) -> None:
    config = tiny_config(objective=MOVING)
    train(config, tmp_path / "moving")
    moving = objective(config)
    for place, row in enumerate(moving.rows):
        found = logged(tmp_path / "moving", f"train/weight/{row.name}")
        # a row of the log has the number of steps done, and so the loss of the step before
        assert found == {done: moving.weights(done - 1)[place] for done in (2, 4, 6)}
    for line in (line for line in rows(tmp_path / "moving") if "train/loss" in line):
        parts = [line[f"train/weight/{row.name}"] * line[f"train/loss/{row.name}"] for row in moving.rows]
        assert line["train/loss"] == pytest.approx(sum(parts), rel=1e-5)
    train(tiny_config(objective=ObjectiveConfig(weights=MOVING.weights)), tmp_path / "still")
    assert not any("train/weight" in key for row in rows(tmp_path / "still") for key in row)
    ends = [weights(tmp_path / name)["txt.token_embedding.weight"] for name in ("moving", "still")]
    assert not torch.equal(*ends)


def test_a_schedule_between_equal_weights_is_none_to_the_bit(tiny_config: Config, tmp_path: Path) -> None:
    still = tiny_config(method="3t-main")
    equal = replace(still.objective, weights_end=(0.6, 0.2, 0.2), weights_schedule="cosine")
    # one that has moved nothing yet when the run ends: its weights come out of the schedule all the same
    later = replace(still.objective, weights_end=(1, 0, 0), weights_schedule="linear", weights_steps=(6, 9))
    train(still, tmp_path / "still")
    for name, options in (("equal", equal), ("later", later)):
        train(replace(still, objective=options), tmp_path / name)
        assert_same_weights(tmp_path / "still", tmp_path / name)


@pytest.mark.parametrize("micro", [0, 7])
def test_a_run_that_continues_within_its_schedule_ends_with_the_same_bits(
    micro: int, tiny_config: Config, tmp_path: Path
) -> None:
    config = tiny_config(objective=MOVING, micro_batch_size=micro, checkpoint_every_steps=2)
    train(config, tmp_path / "whole")
    interrupt_at(3, config, tmp_path / "halves")
    assert train(config, tmp_path / "halves").finished
    assert_same_weights(tmp_path / "whole", tmp_path / "halves")


@pytest.mark.parametrize("turned", [False, True])
def test_rows_without_weight_for_some_steps_leave_everything_finite(
    turned: bool, tiny_config: Config, tmp_path: Path
) -> None:
    ends = ((1.0, 0.0, 0.0), (0.0, 0.5, 0.5))
    start, end = reversed(ends) if turned else ends
    moving = ObjectiveConfig(
        weights=start, weights_end=end, weights_schedule="linear", weights_steps=(2, 4), kind="sigmoid"
    )
    train(tiny_config(objective=moving), tmp_path / "run")
    assert all(value.isfinite().all() for value in weights(tmp_path / "run").values())
    assert "not finite" not in (tmp_path / "run" / "events.log").read_text(encoding="utf-8")


# settings


def test_a_run_writes_the_weights_that_it_has(tiny_config: Config, tmp_path: Path) -> None:
    config = tiny_config(method="3t-main", steps=1)
    train(config, tmp_path)
    path = tmp_path / "config.toml"
    written = read_config(path)
    assert written == resolved(config) and written.objective.weights == (0.6, 0.2, 0.2)
    assert differing_keys(path, config) == [] and train(config, tmp_path).finished
    other = replace(config, objective=replace(config.objective, weights=(0.5, 0.2, 0.2)))
    assert any("objective.weights" in line for line in differing_keys(path, other))
    page = write_run_report(tmp_path).read_text(encoding="utf-8")
    assert "0.6, 0.2, 0.2" in page and "3T main" in page


@pytest.mark.parametrize("method", ["3t", "baseline"])
def test_a_run_of_a_version_without_these_keys_continues(method: Method, tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    config = RunConfig(method=method, third=("timm:x",))
    write_config(replace(config, objective=ObjectiveConfig(weights=(THIRD, THIRD, THIRD))), path)
    kept = [line for line in path.read_text(encoding="utf-8").splitlines() if "weights_" not in line]
    path.write_text("\n".join(kept), encoding="utf-8")
    assert differing_keys(path, config) == []


@pytest.mark.parametrize(
    ("lines", "flags", "expected"),
    [
        ("", "", (THIRD, THIRD, THIRD)),
        ("", "--method 3t-main", (0.6, 0.2, 0.2)),
        ('method = "3t-main"', "", (0.6, 0.2, 0.2)),
        # what a run of 3t has written, and 3t-main
        (f"[objective]\nweights = [{THIRD}, {THIRD}, {THIRD}]", "--method 3t-main", (0.6, 0.2, 0.2)),
        ('method = "3t-main"\n[objective]\nweights = [0.6, 0.2, 0.2]', "--method 3t", (THIRD, THIRD, THIRD)),
        ("[objective]\nweights = [0.5, 0.3, 0.2]", "--method 3t-main", (0.5, 0.3, 0.2)),
        ("[objective]\nweights = [0.5, 0.3, 0.2]", "--objective.weights none", (THIRD, THIRD, THIRD)),
        ('[objective]\nweights = "none"', "--objective.weights 1 0.5 2", (1.0, 0.5, 2.0)),
        ("", f"--method 3t-main --objective.weights {THIRD} {THIRD} {THIRD}", (THIRD, THIRD, THIRD)),
    ],
)
def test_weights_in_files_and_flags(
    lines: str, flags: str, expected: tuple[float, ...], tmp_path: Path
) -> None:
    (tmp_path / "run.toml").write_text(f'third = "timm:x"\n{lines}\n', encoding="utf-8")
    _, arguments = run_arguments(TrainArguments, [str(tmp_path / "run.toml"), *flags.split()], "train")
    assert resolved(arguments.run).objective.weights == expected
    assert objective(arguments.run).weights(0) == expected


def test_a_schedule_in_flags_is_the_one_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('third = "timm:x"\n', encoding="utf-8")
    flags = (
        "--objective.weights 0.2 0.6 0.2 --objective.weights-end 1 0 0.5 --objective.weights-schedule cosine "
        "--objective.weights-steps 1 5"
    )
    _, arguments = run_arguments(TrainArguments, [str(path), *flags.split()], "train")
    assert arguments.run.objective == MOVING
    write_config(arguments.run, path)
    assert read_config(path) == arguments.run


def test_validate_says_the_weights_and_their_schedule(tiny_config: Config, tmp_path: Path) -> None:
    lines = list(validate(tiny_config(objective=MOVING, steps=4), tmp_path))
    rows = "img-txt × 0.2 → 1, img-third × 0.6 → 0, txt-third × 0.2 → 0.5"
    assert f"rows of 3t: {rows} (cosine from step 1 to step 5)" in lines
    assert any("ends at step 4, before the schedule" in line for line in lines)


# comparisons


def test_methods_that_the_given_weights_make_equal_are_not_compared(
    tiny_config: Config, tmp_path: Path
) -> None:
    config = tiny_config(objective=ObjectiveConfig(weights=(0.5, 0.3, 0.2)))
    options = CompareConfig(methods=("3t", "3t-main"), lrs=(1e-3,))
    with pytest.raises(UsageError, match=r"3t and 3t-main are the same .*\[0\.5, 0\.3, 0\.2\].*none"):
        compare(config, options, tmp_path)
    assert not (tmp_path / "runs").exists()


def test_both_weightings_are_compared_each_with_its_own(tiny_config: Config, tmp_path: Path) -> None:
    config = tiny_config(steps=2, embeddings=None)
    options = CompareConfig(methods=("baseline", "3t", "3t-main"), lrs=(1e-3,))
    result = compare(config, options, tmp_path)
    assert result is not None
    for method, own in (("3t", THIRD), ("3t-main", 0.6)):
        described = json.loads((tmp_path / f"runs/{method}-third-seed0-lr0.001/model.json").read_text())
        assert described["rows"][0][2] == own
    assert [row["method"] for row in result["combination"]] == ["3t", "3t-main"]
    assert "3T main img-txt × 0.6, img-third × 0.2" in result["settings"]["weights"]
    texts = [claim["text"] for claim in result["claims"]]
    for name in ("3T is above the baseline", "3T main is above the baseline", "3T main combined"):
        assert any(name in text for text in texts), name
    assert {claim["verdict"] for claim in result["claims"] if claim["id"] == "C6"} == {"held"}
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "3T combined" in page and "3T main combined" in page
    assert {path.name for path in (tmp_path / "figures").glob("combination*")} == {
        "combination-mean_r-1-third.png", "combination-3t-main-mean_r-1-third.png",
    }  # fmt: skip
    table = (tmp_path / "tables" / "combination.csv").read_text(encoding="utf-8").splitlines()
    assert {line.split(",")[0] for line in table} == {"method", "3t", "3t-main"}


def test_claims_are_about_the_forms_of_3t_that_were_compared() -> None:
    alone = {("3t-main", "t"): {0: Measured({}, {})}}
    rows = claims(alone, ["t"], ["3t-main"], Exact())
    texts = [row["text"] for row in rows if row["id"] in ("C1", "C2", "C4")]
    assert sum("3T main" in text for text in texts) == 7 and not any("3T is" in text for text in texts)
    both = {(method, "mismatched"): {0: Measured({}, {})} for method in ("3t", "3t-main")}
    third = [
        row["text"] for row in claims(both, ["mismatched"], ["3t", "3t-main"], Exact()) if row["id"] == "C3"
    ]
    assert len(third) == 3 and sum("LiT" in text for text in third) == 1
