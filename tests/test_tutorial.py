"""The tutorial's commands, run one after the other on small pictures with a small third tower."""

import shutil
from pathlib import Path

import pytest

from test_documented_commands import ROOT, commands
from threetowers import cli

SHORTER = {
    "--seeds 0 1 2": "--seeds 0",
    "--lrs 1e-3 3e-3": "--lrs 1e-3 --jobs 1",
    "--steps 400": "--steps 4",
}
"""What the test gives in place of the tutorial's own values."""


def test_the_tutorial_leads_from_photographs_to_an_export(
    photos: Path, timm_tower: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (ROOT / "docs/tutorial.md").read_text(encoding="utf-8")
    assert all(text.count(words) == 1 for words in SHORTER)
    for long, short in SHORTER.items():
        text = text.replace(long, short)
    text = text.replace("timm:resnet50", timm_tower)
    shutil.copytree(photos.parent, tmp_path / "photos")
    monkeypatch.chdir(tmp_path)

    verbs = []
    for _, words in commands(text):
        if words[0] == "threetowers" and words[1] != "doctor":  # whose answer depends on the machine
            verbs.append(words[1])
            with pytest.raises(SystemExit) as ended:
                cli.main(words[1:])
            assert ended.value.code == 0, words

    assert verbs == ["validate", "embed", "compare", "evaluate", "export"]
    for file in ("runs/compare/report.html", "stores/rn50/store.json", "exported/open_clip_config.json"):
        assert (tmp_path / file).is_file()
    assert [path.parent.name for path in tmp_path.rglob("store.json")] == ["rn50"], (
        "features were stored twice"
    )
