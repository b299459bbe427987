"""Sphinx settings of the documentation site; `make site` builds it into build/site.

The source folder is the repository itself, so that every relative link of a document means the same on the site as on a
page of the repository. A link to a page leads to that page, and a link to any other file to a copy of it. A link that
leads nowhere ends the build. Nothing is fetched: neither fonts, nor scripts, nor inventories of other sites.
"""

import re
import shutil
from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx

import threetowers

ROOT = Path(__file__).parents[2]

project = "threetowers"
author = "The threetowers developers"
project_copyright = author
version = release = threetowers.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
root_doc = "docs/index"
include_patterns = ["*.md", "docs/**.md", "examples/README.md"]
exclude_patterns = ["build", "dist", "runs", "data", "**/.*", ".*", "docs/claims/runs"]
templates_path = ["templates"]
suppress_warnings = ["config.cache"]

myst_heading_anchors = 4
highlight_language = "none"  # a block without a language is a command or an output
default_role = "code"  # docstrings put code between single backticks
viewcode_follow_imported_members = False  # what is imported from outside has no page here
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "undoc-members": True, "ignore-module-all": True}
python_use_unqualified_type_names = True

html_theme = "furo"
html_title = "threetowers"
html_theme_options = {"navigation_with_keys": True}
html_additional_pages = {"index": "index.html"}
html_copy_source = False
html_show_sphinx = False

MARKUP = re.compile(r"([*|_](?=\W|$)|(?<!\w)[*|])")
"""What reStructuredText would take for markup, and docstrings mean as it stands: `*` in patterns, `**` in powers."""


def plain_docstring(
    app: Sphinx, what: str, name: str, found: object, options: object, lines: list[str]
) -> None:
    """Makes reStructuredText of a docstring: escapes what is no markup in it, and marks indented lines as code.

    Code between backticks stays as it is. Examples with `>>>` are recognised without a mark.
    """
    text: list[str] = []
    code = False
    for line in lines:
        indented = line.startswith("    ")
        if indented and not code and (not text or not text[-1]):
            text += ["::", ""]
            code = True
        code = code and (indented or not line)
        text.append(line if code or line.lstrip().startswith(">>>") else escaped(line))
    lines[:] = text


def escaped(line: str) -> str:
    """A line with a backslash before each character that is no markup, outside of backticks.

    >>> escaped("patterns (* and ?), such as `*.jpg`")
    'patterns (\\\\* and ?), such as `*.jpg`'
    """
    pieces = line.split("`")
    pieces[::2] = [MARKUP.sub(r"\\\1", piece) for piece in pieces[::2]]
    return "`".join(pieces)


def folders_are_their_readmes(app: Sphinx, doctree: nodes.document) -> None:
    """A link to a folder leads to the README.md in it, as on a page of the repository."""
    for link in doctree.findall(addnodes.pending_xref):
        if link["reftype"] == "myst" and not link.get("refdomain"):
            target, _ = app.env.relfn2path(f"{link['reftarget']}/README.md", link["refdoc"])
            if Path(app.srcdir, target).is_file():
                link["refdomain"], link["reftargetid"] = "doc", None
                link["reftarget"] = target.removesuffix(".md")


def copy_figures(app: Sphinx, error: Exception | None) -> None:
    """The figures that the README names in HTML, which Sphinx hands through without a look at it."""
    if error is None:
        shutil.copytree(
            ROOT / "docs/figures",
            app.outdir / "docs/figures",
            ignore=shutil.ignore_patterns("*.py", "__pycache__"),
            dirs_exist_ok=True,
        )


def setup(app: Sphinx) -> None:
    """Connects the functions above."""
    app.connect("autodoc-process-docstring", plain_docstring)
    app.connect("doctree-read", folders_are_their_readmes)
    app.connect("build-finished", copy_figures)
