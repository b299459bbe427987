"""What `validate` says a run will take: memory is measured, and everything that is embedded or evaluated counts."""

import mmap
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from kit.runs import Config
from threetowers.commands import validate
from threetowers.config import OptimConfig, RunConfig
from threetowers.run.setup import assemble
from threetowers.settings import write_config
from threetowers.system import PeakMemory

LINUX = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="memory is measured on Linux alone"
)


def told(config: RunConfig, folder: Path) -> str:
    return "\n".join(validate.validate(config, folder))


@LINUX
def test_a_rise_of_memory_is_measured_and_scaled() -> None:
    memory = PeakMemory()
    before = memory.peak(0)
    size = 100 << 20
    with mmap.mmap(-1, size) as block:  # not from the allocator, which may keep freed memory
        block.write(bytes([1]) * size)
    assert memory.peak(1) - before >= 0.9 * size
    assert memory.peak(3) - before == pytest.approx(3 * (memory.peak(1) - before), rel=0.01)
    highest = memory.peak(1)
    assert PeakMemory().peak(0) < highest - (80 << 20), "each measurement begins anew"


@LINUX
@pytest.mark.slow
def test_the_memory_of_a_run_is_foreseen(tiny_config: Config, tmp_path: Path) -> None:
    """In a process of its own: the highest resident size of a short run, within a third of what was said."""
    write_config(tiny_config(method="baseline", steps=3, batch_size=64), tmp_path / "run.toml")
    program = (
        "import re, sys, torch\nfrom pathlib import Path\nfrom threetowers.settings import read_config\n"
        "from threetowers.commands.validate import validate\nfrom threetowers.train.loop import train\n"
        "torch.set_num_threads(1)\nconfig, folder = read_config('run.toml'), Path('run')\n"
        "print(*validate(config, folder), sep='\\n')\nPath('/proc/self/clear_refs').write_text('5')\n"
        "train(config, folder)\n"
        "print('kB', re.search(r'VmHWM:\\s*(\\d+)', Path('/proc/self/status').read_text())[1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=100, check=True
    )
    size, unit = re.search(r"([\d.]+) (MB|GB) of memory at a step", done.stdout).groups()  # type: ignore[union-attr]
    said = float(size) * (1e9 if unit == "GB" else 1e6)
    real = int(done.stdout.split()[-1]) * 1024
    assert said == pytest.approx(real, rel=0.33)


def test_all_images_and_views_count_when_they_are_embedded(tiny_config: Config, tmp_path: Path) -> None:
    config = tiny_config()
    setup = assemble(config, tmp_path / "run")
    whole = len(setup.train) + len(setup.val) + len(setup.test)
    each = validate._Embedding(read=2.0, forward=1.0, memory=0)
    assert validate._all_images(setup, each) == 3.0 * whole
    viewed = replace(config, inputs=replace(config.inputs, stored_views=4, workers=4))
    setup = assemble(viewed, tmp_path / "run")
    assert validate._all_images(setup, each) == 1.0 * (whole + 3 * len(setup.train)), "workers read meanwhile"


def test_the_evaluation_counts_and_what_is_left_out_is_said(tiny_config: Config, tmp_path: Path) -> None:
    text = told(tiny_config(), tmp_path / "run")
    assert re.search(r"needs: about .* to embed all images once, .* to evaluate, ", text)
    assert re.search(r"time: .*; starting, saving, .* are left out", text)


def test_a_warm_up_that_takes_the_whole_run_is_said(tiny_config: Config, tmp_path: Path) -> None:
    assert "--optim.warmup-steps" in told(tiny_config(optim=OptimConfig(warmup_steps=6)), tmp_path / "run")
    assert "--optim.warmup-steps" not in told(
        tiny_config(optim=OptimConfig(warmup_steps=5)), tmp_path / "run"
    )
