"""The images and texts on which an export is compared with the run, and the largest difference that is allowed."""

import numpy as np
from PIL import Image

from threetowers.errors import CheckpointError

TOLERANCE = 1e-5
"""The largest difference between two unit vectors, in any component, at which they count as the same."""
CAPTIONS = (
    "a red square at the top left",
    "Ein Größenvergleich, sehr lang " * 40,  # longer than any context length in use
    "",
    " two  spaces and\na line",
)


def sample_pictures() -> list[Image.Image]:
    """Pictures of noise, square, wide and tall, with even and odd sides; as many as CAPTIONS."""
    rng = np.random.default_rng(0)
    sizes = ((64, 64), (301, 150), (37, 91), (90, 61))
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]


def check_difference(library: str, what: str, difference: float) -> None:
    """Raises CheckpointError for a difference above TOLERANCE, or for NaN."""
    if not difference <= TOLERANCE:
        raise CheckpointError(
            f"{library} computes other {what} from the export than the run does (they differ by {difference:.1e}, and "
            f"at most {TOLERANCE:.0e} is allowed). Nothing was written. Please report this with the model.json of the "
            "run, and export --to open_clip meanwhile"
        )


def exactness(difference: float) -> str:
    """How near to the run's the vectors are, in words."""
    return f"to {difference:.1e}" if difference else "exactly"
