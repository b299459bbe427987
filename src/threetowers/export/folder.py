"""The folder that an export writes: all of its files or none, and no file of another model replaced."""

import contextlib
import json
import sys
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from threetowers.data.source import check_holds_no_data
from threetowers.errors import UsageError
from threetowers.files import write_whole, writing_aside

QUANTIZED = "onnx/text_model_quantized.onnx"
"""Of the two graphs with weights of eight bits, the one that is written last."""
MODELS = ("model.json", "open_clip_config.json", "config.json", "model.safetensors", "onnx", QUANTIZED)
"""Files that belong to a model: of a run, and of each export format."""
HEADING = "# A model trained with threetowers"
"""How the README.md of every export begins, behind the metadata."""


@contextlib.contextmanager
def written_whole(out: Path, own: Collection[str]) -> Iterator[Path]:
    """A temporary folder to fill, whose files move to `out` when the block ends; if it fails, `out` stays as it was.

    own: those of MODELS that this format writes. A README.md in `out` that no export has written, or that somebody has
    given a licence, is kept, and the export's is called README-threetowers.md there. Raises UsageError when `out` holds
    another model, because formats have file names in common, and what this format does not write would remain there,
    and when it holds data.
    """
    for name in MODELS:
        if name not in own and (out / name).exists():
            raise UsageError(f"--out {out}: this folder holds another model ({name}); give an empty folder")
    if not any((out / name).exists() for name in own):
        check_holds_no_data(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
        folder = Path(temporary)
        try:
            yield folder
        except OSError as error:
            if error.filename and folder in Path(error.filename).parents:  # the name that the user knows
                error.filename = str(out / Path(error.filename).relative_to(folder))
            raise
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            target = out / file.relative_to(folder)
            if target == out / "README.md" and target.exists() and not _is_ours(target):
                target = out / "README-threetowers.md"
                print(f"note: {out}/README.md is kept, and the export's is {target.name}", file=sys.stderr)
            target.parent.mkdir(parents=True, exist_ok=True)
            with writing_aside(target) as aside:
                file.replace(aside)


def _is_ours(card: Path) -> bool:
    """Whether an export has written a card, and nobody has given it a licence since."""
    text = card.read_text(encoding="utf-8", errors="replace")
    metadata, rest = "", text
    if text.startswith("---\n"):
        metadata, _, rest = text.removeprefix("---\n").partition("\n---\n")
    licensed = any(line.startswith("license") for line in metadata.splitlines())
    return rest.startswith(HEADING) and not licensed


def write_json(path: Path, value: Any) -> None:
    """Writes a value as indented JSON in UTF-8."""
    write_whole(path, json.dumps(value, indent=2, ensure_ascii=False))


def listed(lines: Collection[str]) -> str:
    """Lines as a list in Markdown."""
    return "\n".join(f"- {line}" for line in lines)
