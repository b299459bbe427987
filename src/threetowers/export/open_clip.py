"""A finished run as a directory that open_clip, and whatever loads open_clip models, takes.

export_open_clip("runs/mine", "exported")
# open_clip.create_model_and_transforms("local-dir:exported")
"""

import json
import sys
from pathlib import Path

from safetensors.torch import save_file

from threetowers.files import disk_errors
from threetowers.run.finished import load_run
from threetowers.towers.pair import assemble


def export_open_clip(run: str | Path, out: str | Path) -> Path:
    """Writes open_clip_config.json, open_clip_model.safetensors and the tokenizer; returns the directory.

    Holds the two main towers and the scale: no third tower, no head. Raises CheckpointError for an unfinished run.
    """
    finished = load_run(run)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    architecture = finished.architecture
    pair = assemble(architecture.model_cfg, finished.img, finished.txt, finished.scale)
    state = {name: tensor.contiguous().clone() for name, tensor in pair.state_dict().items()}
    weights = folder / "open_clip_model.safetensors"
    with disk_errors(weights):
        save_file(state, weights)
    spec = architecture.image
    if spec.resize_size not in (0, spec.size):
        print(
            f"note: this image tower was read after scaling to {spec.resize_size} and taking the central {spec.size} "
            f"pixels; open_clip's format has no place for that and will scale to {spec.size}",
            file=sys.stderr,
        )
    config = {
        "model_cfg": architecture.model_cfg,
        "preprocess_cfg": {
            "size": spec.size,
            "mode": "RGB",
            "mean": list(spec.mean),
            "std": list(spec.std),
            "interpolation": spec.interpolation,
            "resize_mode": spec.resize,
            "fill_color": 0,
        },
    }
    finished.tokenizer.save(folder)
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return folder
