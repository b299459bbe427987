"""The hours that the recipes of docs/recipes.md should take, computed from the assumptions below and not measured.

    python docs/hours.py    # prints the table, which `make docs` puts into the page

A transformer layer of width w costs about 24 n w² + 4 n² w floating-point operations for n tokens, and a training step
three times its forward pass. A second forward pass is added where the batch goes through the towers in pieces.
"""

from dataclasses import dataclass

PEAK = 312e12
"""bf16 operations a second of the assumed GPU, an A100, by its data sheet."""
USED = 0.35
"""Share of the peak that training is assumed to reach."""
IMAGES = 2_400
"""Images a second that 16 cores are assumed to decode, crop and resize, from JPEG files of about 256 pixels."""
PEAK_FP32, USED_FP32 = 19.5e12, 0.6
"""The same for fp32, in which a frozen tower's features are computed unless bf16 is asked for."""


def layers(depth: int, width: int, tokens: int) -> float:
    """Operations of one forward pass of a transformer, for one sample."""
    return depth * (24.0 * tokens * width**2 + 4.0 * tokens**2 * width)


B32, B16, B16_256 = layers(12, 768, 50), layers(12, 768, 197), layers(12, 768, 261)
L14, L16_256 = layers(24, 1024, 257), layers(24, 1024, 261)
TEXT = layers(12, 512, 77)


@dataclass(frozen=True)
class Recipe:
    """name: as the page has it. seen: samples that the run sees. image, third: operations of one forward pass."""

    name: str
    images: int
    steps: int
    batch: int
    image: float
    third: float
    pieces: bool = False

    def embedding(self) -> float:
        """Hours for storing the third tower's features of all images."""
        return self.images * max(self.third / (PEAK_FP32 * USED_FP32), 1 / IMAGES) / 3600

    def training(self) -> float:
        """Hours of one run."""
        passes = 4 if self.pieces else 3
        step = passes * (self.image + TEXT) / (PEAK * USED)
        return self.steps * self.batch * max(step, 1 / IMAGES) / 3600


RECIPES = (
    Recipe("Flickr30k", 29_000, 1_150, 512, B16, B16),
    Recipe("COCO", 113_287, 1_100, 1_024, B16, B16),
    Recipe("CC3M", 2_500_000, 24_400, 1_024, B32, B16_256),
    Recipe("CC12M", 8_500_000, 12_500, 4_096, B16, B16_256, pieces=True),
    Recipe("Pathology", 200_000, 2_000, 1_024, B32, L14),
    Recipe("Satellite", 200_000, 2_000, 1_024, B32, L16_256),
)


def rows() -> list[tuple[str, ...]]:
    """For each recipe: name, images, samples seen, hours for embedding, hours of one run."""
    return [
        (
            each.name,
            f"{each.images:,}",
            f"{each.steps * each.batch / 1e6:.1f} M",
            _hours(each.embedding()),
            _hours(each.training()),
        )
        for each in RECIPES
    ]


def _hours(value: float) -> str:
    return f"{value:.1f}" if value >= 0.1 else "below 0.1"


if __name__ == "__main__":
    for row in rows():
        print("\t".join(row))
