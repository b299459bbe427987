"""Every example runs, with few steps, and prints what it promises."""

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"

PRINTED = {
    "train_on_a_folder": ("the frozen tower names", "retrieval on", "with third combined"),
    "compare_methods": ("mean R@1", "report.html"),
    "use_from_python": (
        "a small red square on black, top left",
        "found ",
        "largest difference to open_clip: ",
    ),
    "add_a_loss": ("hinge", "val/mean_r@1"),
}
FLAGS = {"compare_methods": ("--steps", "5", "--seeds", "0"), "use_from_python": ("--steps", "5")}


def test_every_example_is_listed() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} - {"squares"} == PRINTED.keys()


@pytest.mark.parametrize("name", PRINTED)
def test_example(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, "--out", "out", *FLAGS.get(name, ("--steps", "20"))])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert all(words in printed for words in PRINTED[name]), printed
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "an example writes into --out alone"
    if name == "use_from_python":
        assert float(printed.split("open_clip: ")[1]) < 1e-5
