"""The notebooks hold no outputs, and run from their first cell to the last."""

import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def cells(path: Path) -> list[str]:
    """The code of a notebook, cell by cell."""
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_not_kept(path: Path) -> None:
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None
    assert len(cells(path)) >= 3


def test_the_notebook_without_training_says_what_is_true(capsys: pytest.CaptureFixture[str]) -> None:
    space: dict[str, object] = {}
    for code in cells(FOLDER / "look_inside.ipynb"):
        exec(compile(code, "<notebook>", "exec"), space)
    lines = capsys.readouterr().out.splitlines()
    assert "    img · txt: softmax, weight 0.600" in lines
    chance, same, right = (float(number) for number in " ".join(lines[-3:-1]).split())
    assert chance == pytest.approx(same) and right < 0.01
    plain, tiled = map(float, lines[-1].split())
    assert tiled == pytest.approx(plain, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path) -> None:
    client = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    client.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(FOLDER)}}).execute()
