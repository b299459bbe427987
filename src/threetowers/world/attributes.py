"""The built-in world's attributes as class sets of their own: shape, colour, texture, size, background and layout.

Each is read from the labels of `attributes` or `scenes`, so that the images are those of the world on disk.
"""

from dataclasses import dataclass

import numpy as np

from threetowers.world.scenes import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    SIZES,
    TEXTURES,
    Ints,
    Kind,
    class_names,
    templates,
)

_LAYOUTS = ("a single shape", "a pair of shapes side by side", "a pair of shapes stacked")


@dataclass(frozen=True)
class Attribute:
    """A class set. kind: whose images and labels it is read from. place: of its word among the parts of a label.

    class_names, templates: for zero-shot classification, in the words of the captions.
    """

    kind: Kind
    place: int
    class_names: tuple[str, ...]
    templates: tuple[str, ...]

    def of(self, labels: Ints) -> Ints:
        """The class of each image in this set, from its label in the set of its kind."""
        parts: Ints = np.array(_PARTS[self.kind])[labels, self.place]
        return parts


_PARTS = {
    "attributes": [
        (SIZES.index(size), TEXTURES.index(texture), COLOURS.index(colour), SHAPES.index(shape))
        for size, texture, colour, shape in map(str.split, class_names("attributes"))
    ],
    "scenes": [
        (layout, background) for layout in range(len(_LAYOUTS)) for background in range(len(BACKGROUNDS))
    ],
}
"""Of each class of a labelled kind, its class in every attribute."""

_OF_SHAPES = tuple(f"a {{}} {shape}" for shape in SHAPES)
ATTRIBUTES = {
    "shape": Attribute("attributes", 3, SHAPES, templates()),
    "texture": Attribute("attributes", 1, TEXTURES, _OF_SHAPES),
    "colour": Attribute("attributes", 2, COLOURS, _OF_SHAPES),
    "size": Attribute("attributes", 0, SIZES, _OF_SHAPES),
    "background": Attribute("scenes", 1, BACKGROUNDS, tuple(f"a {shape} on {{}}" for shape in SHAPES)),
    "layout": Attribute("scenes", 0, _LAYOUTS, tuple(f"{{}} on {background}" for background in BACKGROUNDS)),
}
