"""Three Towers: image-text models that learn from frozen pretrained models without being locked to them.

A finished run in three lines:

    import threetowers
    model = threetowers.load("runs/mine")
    model.score(["a.jpg"], ["a red bicycle", "a harbour at night"])
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from threetowers.run.finished import FinishedRun

__all__ = ["__version__", "load"]
__version__ = "0.1.0"


def load(run: str, device: str = "cpu") -> "FinishedRun":
    """A finished run's main pair, ready to encode; see `threetowers.run.finished.FinishedRun`."""
    from threetowers.run.finished import load_run

    return load_run(run, device)
