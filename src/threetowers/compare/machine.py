"""The machine and the versions that a figure was measured with."""

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def machine(device: str = "cpu") -> dict[str, Any]:
    """Processor, cores, threads, device and versions, as compare.json and the benchmarks' results hold them.

    device: what the figures were measured on; anything but `cpu` names the GPU where there is one.
    """
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line
        ]
        cpu = names[0] if names else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() and device != "cpu" else "cpu",
        "python": platform.python_version(),
        **{name: version(name) for name in ("threetowers", "torch", "timm", "open_clip_torch")},
    }
