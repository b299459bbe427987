"""The formats that a finished run can be exported to.

This file imports nothing heavy, because `threetowers export --help` is drawn from the list.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Format:
    """One export format.

    help: one line for the command line. write: run folder, folder to write → the folder written. loading: the Python
    expression that loads the result; `{folder}` marks the place of the folder. files: what every export of the format
    consists of, without which `push` sends nothing. combine: as `write`, with the weight of the third tower in the
    convex combination; None for a format whose models have one image tower.
    """

    help: str
    write: Callable[[Path, Path], Path]
    loading: str
    files: tuple[str, ...]
    combine: Callable[[Path, Path, float], Path] | None = None

    def how_to_load(self, folder: Path) -> str:
        """The expression with the folder in its place."""
        return self.loading.format(folder=folder)


def _open_clip(run: Path, out: Path) -> Path:
    from threetowers.export.open_clip import export_open_clip

    return export_open_clip(run, out)


def _transformers(run: Path, out: Path) -> Path:
    from threetowers.export.transformers import export_transformers

    return export_transformers(run, out)


def _onnx(run: Path, out: Path, alpha: float = 0.0) -> Path:
    from threetowers.export.onnx import export_onnx

    return export_onnx(run, out, alpha=alpha)


def _onnx_int8(run: Path, out: Path, alpha: float = 0.0) -> Path:
    from threetowers.export.onnx import export_onnx

    return export_onnx(run, out, quantize=True, alpha=alpha)


ALSO = ("tokenizer.json", "tokenizer_config.json")
"""Files that some exports have besides: open_clip brings its own vocabulary itself."""
_READ_BY_TRANSFORMERS = ("README.md", "config.json", "preprocessor_config.json", *ALSO)
_GRAPHS = ("onnx/vision_model.onnx", "onnx/text_model.onnx")

FORMATS = {
    "open_clip": Format(
        "a directory for open_clip and the tools that load its models",
        _open_clip,
        'open_clip.create_model_and_transforms("local-dir:{folder}")',
        ("README.md", "open_clip_config.json", "open_clip_model.safetensors"),
    ),
    "transformers": Format(
        "a folder for transformers and sentence-transformers, of open_clip's own text transformer, and its own ViT "
        "or a timm network",
        _transformers,
        'transformers.AutoModel.from_pretrained("{folder}")',
        (*_READ_BY_TRANSFORMERS, "model.safetensors"),
    ),
    "onnx": Format(
        "graphs for onnxruntime and transformers.js, one for images and one for texts",
        _onnx,
        'onnxruntime.InferenceSession("{folder}/onnx/text_model.onnx")',
        (*_READ_BY_TRANSFORMERS, *_GRAPHS),
        _onnx,
    ),
    "onnx-int8": Format(
        "the same, and beside them graphs with weights of eight bits, whose loss in retrieval is measured",
        _onnx_int8,
        'onnxruntime.InferenceSession("{folder}/onnx/text_model_quantized.onnx")',
        (
            *_READ_BY_TRANSFORMERS,
            *_GRAPHS,
            "onnx/vision_model_quantized.onnx",
            "onnx/text_model_quantized.onnx",
        ),
        _onnx_int8,
    ),
}
"""Every format by the name that --to takes. A new format is one file beside this one and one entry here."""


def formats_help() -> str:
    """The formats and what they are, in one line."""
    return "; ".join(f"{name}: {form.help}" for name, form in FORMATS.items())
