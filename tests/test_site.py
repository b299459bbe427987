"""The documentation site: it builds without a warning, stands alone, and every page and module has its place."""

import ast
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[1]


class Links(HTMLParser):
    """What a page loads, and where it leads."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.linked: list[str] = []
        self.ids: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.ids |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a":
            self.linked += [given["href"]] if "href" in given else []
        elif tag == "link" and given.get("rel") in ("index", "search", "next", "prev", "canonical"):
            self.linked.append(given.get("href", ""))
        else:
            loads = [given.get("src", ""), given.get("href", "") if tag == "link" else ""]
            self.loaded += filter(None, loads + given.get("srcset", "").split(", "))


def test_every_page_has_a_place_in_the_navigation() -> None:
    """What the build checks too, without the build."""
    index = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    trees = "\n".join(re.findall(r"```\{toctree\}\n(.*?)^```$", index, re.DOTALL | re.MULTILINE))
    named = {
        (ROOT / "docs" / line.strip()).resolve().with_suffix(".md")
        for line in trees.splitlines()
        if line.strip() and not line.startswith(":")
    }
    pages = {
        path for place in ("docs", "docs/howto", "docs/generated") for path in (ROOT / place).glob("*.md")
    }
    assert pages - named == {ROOT / "docs/index.md"}
    assert {path for path in named if not path.is_file()} == set()


def test_the_reference_has_every_module_that_documents_and_examples_import() -> None:
    reference = set(re.findall(r"automodule:: ([\w.]+)", (ROOT / "docs/api.md").read_text(encoding="utf-8")))
    reference |= {"threetowers.config"}  # its page is settings.md
    named = set()
    for path in (ROOT / "examples").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("threetowers"):
                named.add(node.module)
    for path in (ROOT / "examples/notebooks").glob("*.ipynb"):
        named |= set(re.findall(r'"from (threetowers[\w.]*) import', path.read_text(encoding="utf-8")))
    for name in ("README.md", "CONTRIBUTING.md", "docs/api.md", "docs/tutorial.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        named |= set(re.findall(r"^from (threetowers[\w.]*) import", text, re.MULTILINE))
    assert len(named) > 20
    assert named - reference == set()


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_stands_alone(tmp_path: Path) -> None:
    pytest.importorskip("sphinx")
    pytest.importorskip("furo")
    site = tmp_path / "site"
    words = ["-W", "--keep-going", "-q", "-c", "docs/site", "-d", str(tmp_path / "cache"), ".", str(site)]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "http_proxy": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", *words],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr

    pages: dict[Path, Links] = {}
    for path in site.rglob("*.html"):
        if "_downloads" not in path.parts:
            pages[path] = Links()
            pages[path].feed(path.read_text(encoding="utf-8"))
    assert {site / "index.html", site / "docs/index.html", site / "docs/howto/data.html"} <= pages.keys()
    for page, links in pages.items():
        assert [place for place in links.loaded if urlsplit(place).netloc] == [], page
        for place in links.loaded + links.linked:
            parts = urlsplit(place)
            if parts.scheme or parts.netloc:
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            assert target.is_file(), (page, place)
            if parts.fragment and target in pages:
                assert unquote(parts.fragment) in pages[target].ids, (page, place)
    for style in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import )['\"]?https?:", style.read_text(encoding="utf-8")), style
    text = (site / "docs/api.html").read_text(encoding="utf-8")
    assert "unit vectors float32" in text.replace("Unit", "unit")  # of FinishedRun.encode_text
