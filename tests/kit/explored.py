"""Runs for the page of `explore`, a caption that tries to be markup, and pictures to upload."""

import io
from dataclasses import replace
from pathlib import Path

from PIL import Image

from kit.runs import TINY_INPUTS, TINY_PAIR
from threetowers.config import OptimConfig, RunConfig
from threetowers.evaluate.evaluation import evaluate_run
from threetowers.train.loop import train

SCRIPT = (
    "<script>document.title = 'pwned'</script><img src=x onerror=\"document.title='pwned'\"> a red square"
)


def explored_runs(place: Path, photos: Path, timm_tower: str) -> dict[str, Path]:
    """Runs of a few steps: a baseline and a LiT that were evaluated, a 3T that was not, and one that has only begun."""
    config = RunConfig(
        data=str(photos), third=(timm_tower,), steps=6, batch_size=16, log_every_steps=2, device="cpu",
        pair=TINY_PAIR, inputs=TINY_INPUTS, optim=OptimConfig(lr=1e-3, warmup_steps=2),
    )  # fmt: skip
    found = {name: place / name for name in ("baseline", "lit", "3t")}
    for name, folder in found.items():
        train(replace(config, method=name), folder)  # type: ignore[arg-type]
        if name != "3t":
            evaluate_run(folder)
    found["begun"] = place / "begun"
    found["begun"].mkdir()
    for name in ("config.toml", "metrics.jsonl"):
        (found["begun"] / name).write_bytes((found["3t"] / name).read_bytes())
    with (found["begun"] / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "train/loss": NaN, "val/mean_r@1": 0.5}\n{"step": 8, "train/lo')
    return found


def png(colour: str = "red", size: tuple[int, int] = (40, 40)) -> bytes:
    """A picture of one colour."""
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()
