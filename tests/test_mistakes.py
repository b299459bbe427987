"""Every seeded mistake is answered on one screen, with its exit code and what the user needs to mend it."""

import re
from pathlib import Path

import pytest

import mistakes
from kit.mistakes import make_kit, told
from mistakes import COLUMNS, ROWS, Mistake


@pytest.fixture(scope="session")
def kit(tmp_path_factory: pytest.TempPathFactory, own_cache: None) -> Path:
    return make_kit(tmp_path_factory.mktemp("mistakes") / "kit")


@pytest.mark.parametrize(
    "mistake", list(mistakes.every()), ids=lambda mistake: mistake.what.replace(" ", "-")
)
def test_a_mistake_is_answered_on_one_screen(mistake: Mistake, kit: Path, tmp_path: Path) -> None:
    answer = mistakes.made(mistake, kit, tmp_path / "here")
    assert answer.code == mistake.code, answer.output
    assert "Traceback" not in answer.output
    trained = " steps, " in answer.message
    assert mistake.code != 2 or not trained, "what cannot be meant is said before a step is done"
    message = " ".join(answer.message.split())
    assert [part for part in mistake.says if part not in message] == [], answer.message
    rows = mistakes.screen(answer.output)
    assert len(rows) <= ROWS and max(map(len, rows)) <= COLUMNS, answer.output


@pytest.mark.parametrize("flags", ["--steps 0", "--device gpu", "--pair.model ViT-B-23", "--third none"])
def test_settings_are_judged_before_data_is_read(flags: str, kit: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    answer = told(f"train run.toml --data {tmp_path}/empty {flags}", kit)
    assert answer.code == 2 and "empty" not in answer.output, answer.output


def test_the_mistakes_are_many_and_the_page_shows_them_all() -> None:
    """`python tests/mistakes.py` has been run since a mistake was added."""
    page = mistakes.PAGE.read_text(encoding="utf-8")
    shown = re.findall(r"^### (.*)$", page, re.MULTILINE)
    made = [mistake.what for mistake in mistakes.every()]
    assert [what[0].lower() + what[1:] for what in shown] == [what[0].lower() + what[1:] for what in made]
    assert len(made) >= 40 and len(set(made)) == len(made)
