"""What the documents show is true: their Python runs, their tables and figures are those of the code, doctests pass."""

import doctest
import importlib
import importlib.util
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image

from kit.runs import TINY_INPUTS, TINY_PAIR
from threetowers.config import RunConfig
from threetowers.export.open_clip import export_open_clip
from threetowers.report.claims import title
from threetowers.train.loop import train

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs" / "howto").glob("*.md")),
]
BLOCK = re.compile(r"^(<!-- not run -->\n)?```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks() -> Iterator[tuple[str, str]]:
    """Every Python block of the documents that is not marked as `not run`, by file and line."""
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        for found in BLOCK.finditer(text):
            if not found[1]:
                yield f"{path.name}:{text[: found.start()].count(chr(10)) + 2}", found[2]


def docs_module(path: str) -> ModuleType:
    """A script under docs/, imported by its path; it finds the scripts beside it, as when it is run."""
    if str(ROOT / "docs") not in sys.path:
        sys.path.append(str(ROOT / "docs"))
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / "docs" / path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def workplace(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the blocks name: a finished run, its export, photos with captions, and two photos more."""
    folder = tmp_path_factory.mktemp("workplace")
    config = RunConfig(
        data=str(photos),
        method="baseline",
        steps=2,
        batch_size=16,
        pair=TINY_PAIR,
        inputs=TINY_INPUTS,
    )
    train(config, folder / "runs" / "mine")
    export_open_clip(folder / "runs" / "mine", folder / "exported")
    shutil.copytree(photos.parent, folder / "photos")
    for name, colour in (("a.jpg", "red"), ("b.jpg", "blue")):
        Image.new("RGB", (40, 40), colour).save(folder / name)
        Image.new("RGB", (40, 40), colour).save(folder / "photos" / name)
    return folder


@pytest.mark.parametrize("code", [pytest.param(code, id=name) for name, code in blocks()])
def test_python_in_the_documents_runs(code: str, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    exec(compile(code, "<document>", "exec"), {"__name__": "document"})


def test_the_documents_have_python() -> None:
    assert {name.partition(":")[0] for name, _ in blocks()} >= {"README.md", "CONTRIBUTING.md"}


def test_scores_are_as_the_readme_says(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import threetowers

    monkeypatch.chdir(workplace)
    model = threetowers.load("runs/mine")
    scores = model.score(["a.jpg", "b.jpg"], ["a red bicycle", "a harbour at night"])
    assert scores.shape == (2, 2)
    assert scores.abs().max() <= 1 + 1e-6
    assert torch.allclose(model.encode_image(["a.jpg"]).norm(dim=-1), torch.ones(1))


def test_the_table_of_places_names_what_exists() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text.partition("## Where things are")[2].partition("\n\nA module imports")[0]
    places = re.findall(r"`([\w/]+(?:\.py|/))`", table.replace("`src/threetowers/`", ""))
    assert len(places) > 20
    assert [place for place in places if not (SOURCE / "threetowers" / place).exists()] == []


def test_tables_are_those_of_the_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert docs_module("tables.py").main(["--check"]) == 0, capsys.readouterr().out


def test_every_table_has_a_place_and_a_changed_one_is_noticed() -> None:
    module = docs_module("tables.py")
    known = module.tables()
    text = "\n".join(path.read_text(encoding="utf-8") for path in DOCUMENTS)
    assert set(re.findall(r"<!-- table: ([\w-]+) -->", text)) == known.keys()
    assert text.count("<!-- table: ") == len(module.MARKED.findall(text)), "a table without its end"
    changed = known | {"presets": "| another |"}
    assert "| another |" in module.filled(text, changed)
    with pytest.raises(KeyError):
        module.filled("<!-- table: unknown -->\n<!-- end -->", known)


def test_the_table_of_claims_has_every_claim_of_the_results_and_no_other() -> None:
    module = docs_module("tables.py")
    study = json.loads((ROOT / "docs" / "claims" / "study.json").read_bytes())
    readme = (ROOT / "README.md").read_text(encoding="utf-8").partition("<!-- table: claims -->")[2]
    rows = re.findall(r"^\| (C\d.*?) \| \*\*(.*?)\*\* \|$", readme.partition("<!-- end -->")[0], re.MULTILINE)
    finished = all(row["done"] == row["total"] for row in study["progress"] if row["part"] == "main")
    assert finished or not study["claims"], "verdicts while seeds are still missing"
    assert rows == [(title(claim), claim["verdict"]) for claim in study["claims"]]
    claim = {"id": "C3", "third": "mismatched", "text": "3T is not worse.", "verdict": "not shown"}
    made = study | {"claims": [claim], "progress": [{"part": "main", "done": 3, "total": 9}]}
    assert "| C3 mismatched: 3T is not worse. | **not shown** |" in module.claims(made)
    assert module.claims(made | {"claims": []}) == "No claim is judged yet: 3 of 9 runs are done."


def test_figures_are_those_of_the_code() -> None:
    drawn = docs_module("figures/make.py").figures()
    committed = {
        path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs/figures").glob("*.svg")
    }
    assert drawn == committed, "run `make docs`"


def doctested() -> list[str]:
    paths = sorted(path for path in SOURCE.rglob("*.py") if ">>> " in path.read_text(encoding="utf-8"))
    return [".".join(path.relative_to(SOURCE).with_suffix("").parts) for path in paths]


@pytest.mark.parametrize("name", doctested())
def test_doctests(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("name", ["tables.py", "site/conf.py"])
def test_doctests_of_the_scripts_of_the_documents(name: str) -> None:
    if name == "site/conf.py":
        pytest.importorskip("sphinx")
    result = doctest.testmod(docs_module(name))
    assert result.attempted > 0
    assert result.failed == 0


def test_what_the_page_on_choosing_says_is_what_the_study_found() -> None:
    study = json.loads((ROOT / "docs" / "claims" / "study.json").read_bytes())
    found = {(row["label"], row["third"]): row["metrics"] for row in study["methods"]}

    def interval(label: str, third: str, metric: str) -> tuple[float, float, float]:
        cell = found[label, "" if label == "baseline" else third][metric]
        return cell["low"], cell["mean"], cell["high"]

    def above(one: str, other: str, third: str, metric: str) -> bool:
        return interval(one, third, metric)[0] > interval(other, third, metric)[2]

    r1, top1, forms = "retrieval/mean_r@1", "zero_shot/top1", ("3t", "3t-main")
    assert not any(above(a, b, "rich", r1) for form in forms for a, b in ((form, "lit"), ("lit", form)))
    assert all(above("lit", form, third, top1) for form in forms for third in ("rich", "matched", "partly"))
    assert all(
        above(form, other, third, r1)
        for form in forms for third in ("matched", "partly") for other in ("baseline", "lit")
    )  # fmt: skip
    assert not above("3t", "lit-unlocked", "matched", r1) and not above("lit-unlocked", "3t", "matched", r1)
    assert not above("lit", "lit-unlocked", "matched", top1)
    assert above("3t-main", "baseline", "mismatched", r1)
    assert all(above("baseline", other, "mismatched", r1) for other in ("3t", "lit"))
    assert interval("lit-unlocked", "mismatched", r1)[1] < interval("baseline", "mismatched", r1)[1]
    assert not any(
        above("baseline", form, "random", r1) or above(form, "baseline", "random", r1) for form in forms
    )
    assert above("baseline", "lit", "random", r1)
    for third in ("matched", "rich", "partly", "mismatched", "random"):
        assert (
            interval("3t-main", third, "control/mean_r@1")[1]
            > interval("3t-main", third, "combination/mean_r@1")[1]
        )
    assert all(above("3t", "3t-main", third, top1) for third in ("matched", "rich", "partly"))
    assert not any(
        above(a, b, third, r1) for third in ("matched", "rich", "partly") for a, b in (forms, forms[::-1])
    )

    growth = {
        (claim["third"], claim["text"].rpartition(" with ")[2]): claim
        for claim in study["claims"]
        if claim["id"] == "C5"
    }
    for third in ("matched", "mismatched"):
        assert growth[third, "model size"]["verdict"] == "held"
    assert growth["matched", "data"]["verdict"] == "not held"
    assert growth["matched", "data"]["tests"][0]["high"] < 0
    assert growth["mismatched", "data"]["verdict"] == "not shown"
    short = [cell["gap"]["high"] for cell in study["growth"] if cell["third"] == "matched"]
    assert len(short) == 9 and max(short) < 0
    assert max(cell["num_main"] for cell in study["growth"]) < 16 * min(
        cell["num_main"] for cell in study["growth"]
    )
    assert above("3t", "lit", "matched", r1)
