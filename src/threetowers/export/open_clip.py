"""A finished run as a directory for open_clip and the tools that load its models.

export_open_clip("runs/mine", "exported")
# open_clip.create_model_and_transforms("local-dir:exported")
"""

import json
import sys
from pathlib import Path
from typing import Any

from threetowers.data.transforms import ImageSpec
from threetowers.files import write_whole
from threetowers.run.finished import load_run
from threetowers.towers.pair import assemble
from threetowers.towers.weights import write_safetensors


def export_open_clip(run: str | Path, out: str | Path) -> Path:
    """Writes open_clip_config.json, open_clip_model.safetensors and the tokenizer; returns the directory.

    The export holds the two main towers and the scale, no third tower and no head. Raises CheckpointError for an
    unfinished run.
    """
    finished = load_run(run)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    architecture = finished.architecture
    pair = assemble(architecture.model_cfg, finished.img, finished.txt, finished.scale)
    state = {name: tensor.contiguous().clone() for name, tensor in pair.state_dict().items()}
    weights = folder / "open_clip_model.safetensors"
    write_safetensors(weights, state)
    spec = architecture.image
    if spec.resize_size not in (0, spec.size):
        print(
            f"note: this image tower takes the central {spec.size} pixels of an image scaled to {spec.resize_size}; "
            f"open_clip's format cannot describe that, and open_clip will scale to {spec.size}",
            file=sys.stderr,
        )
    config = {"model_cfg": architecture.model_cfg, "preprocess_cfg": _preprocess_cfg(spec)}
    finished.tokenizer.save(folder)
    write_whole(folder / "open_clip_config.json", json.dumps(config, indent=2))
    return folder


def _preprocess_cfg(spec: ImageSpec) -> dict[str, Any]:
    return {
        "size": spec.size,
        "mode": "RGB",
        "mean": list(spec.mean),
        "std": list(spec.std),
        "interpolation": spec.interpolation,
        "resize_mode": spec.resize,
        "fill_color": 0,
    }
