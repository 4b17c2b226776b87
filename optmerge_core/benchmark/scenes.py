"""Scenes of coloured shapes, for VQA and Grounding, and what all drawings share.

`vqa` and `grounding` take a numpy random generator and a level (`grid` and `caption` describe
everything, cell by cell or thing by thing; `easy`; `full` is the task proper, and `medium` is
the same but for OCR, where it has fewer letters in one line) and return (image,
question, answer, kind), the image 56 x 56 RGB.
"""

from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

IMAGE_SIZE = 56
CELL = 14  # pixels of the image that one image token stands for, each way
BIN = 4  # pixels per location token: boxes are quantised to multiples of it

COLORS = {
    "red": (214, 48, 48),
    "green": (46, 160, 67),
    "blue": (52, 92, 210),
    "yellow": (228, 196, 40),
    "purple": (142, 68, 173),
    "orange": (236, 128, 36),
}
SHAPES = ("circle", "square", "triangle", "diamond", "cross")
CHARACTERS = "ABCDEFHKLMNPRTUVXYZ2345679"
ORDINALS = ("first", "second", "third", "fourth", "fifth")
SIDES = {"leftmost": (0, -1), "rightmost": (0, 1), "highest": (1, -1), "lowest": (1, 1)}
FONTS = tuple(
    Path(matplotlib.get_data_path(), "fonts", "ttf", f"DejaVu{name}.ttf")
    for name in ("Sans", "Sans-Bold", "SansMono", "Serif")
)
_FONT_CACHE: dict[tuple[int, int], ImageFont.FreeTypeFont] = {}


def font(size, style=0):
    """A DejaVu font as matplotlib ships it, so that text looks the same on every machine."""
    if (size, style) not in _FONT_CACHE:
        _FONT_CACHE[size, style] = ImageFont.truetype(str(FONTS[style]), size)
    return _FONT_CACHE[size, style]


def canvas(rng):
    shade = int(rng.integers(232, 256))
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), (shade, shade, int(rng.integers(232, 256))))
    return image, ImageDraw.Draw(image)


def tint(rng, color):
    return tuple(
        int(np.clip(c + d, 0, 255))
        for c, d in zip(COLORS[color], rng.integers(-14, 15, 3), strict=True)
    )


def choice(rng, items):
    return items[int(rng.integers(len(items)))]


@dataclass(frozen=True)
class Shape:
    color: str
    shape: str
    box: tuple[int, int, int, int]  # left, top, right, bottom in pixels

    @property
    def name(self):
        return f"{self.color} {self.shape}"

    @property
    def center(self):
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2

    @property
    def place(self):
        x, y = self.center
        half = IMAGE_SIZE / 2
        return f"{'top' if y < half else 'bottom'} {'left' if x < half else 'right'}"


def draw_shape(draw, shape, fill):
    x0, y0, x1, y1 = shape.box
    cx, cy = shape.center
    third = (x1 - x0) // 3
    if shape.shape == "circle":
        draw.ellipse(shape.box, fill)
    elif shape.shape == "square":
        draw.rectangle(shape.box, fill)
    elif shape.shape == "triangle":
        draw.polygon([(cx, y0), (x1, y1), (x0, y1)], fill)
    elif shape.shape == "diamond":
        draw.polygon([(cx, y0), (x1, cy), (cx, y1), (x0, cy)], fill)
    else:
        draw.rectangle((x0 + third, y0, x1 - third, y1), fill)
        draw.rectangle((x0, y0 + third, x1, y1 - third), fill)


def scene(rng, count, colors=tuple(COLORS), shapes=SHAPES):
    """Draw `count` shapes, no two of the same colour and shape, in cells of a 4 x 4 grid.

    A cell is 14 pixels wide, what one image token of the model sees; size and place in it vary.
    """
    pairs = [(c, s) for c in colors for s in shapes]
    chosen = [pairs[i] for i in rng.permutation(len(pairs))[:count]]
    objects = []
    for (color, shape), cell in zip(chosen, rng.permutation(16)[:count], strict=True):
        size = int(rng.integers(9, 13))
        x, y = (CELL * int(c) + int(rng.integers(0, CELL - size)) for c in (cell % 4, cell // 4))
        objects.append(Shape(color, shape, (x, y, x + size, y + size)))
    image, draw = canvas(rng)
    for item in objects:
        draw_shape(draw, item, tint(rng, item.color))
    return image, objects


def locations(box):
    """A box as four location tokens: left, top, right, bottom in units of BIN pixels."""
    return "".join(f"<loc{round(v / BIN)}>" for v in box)


def grid(items):
    """What stands in each cell of the image, row by row: {(column, row): word} -> 16 words."""
    return " ".join(items.get((i % 4, i // 4), "none") for i in range(16))


def scene_grid(rng):
    """The colours, or the shapes, of all 16 cells of a scene."""
    image, objects = scene(rng, int(rng.integers(4, 11)))
    what = choice(rng, ("color", "shape"))
    cells = {(o.box[0] // CELL, o.box[1] // CELL): getattr(o, what) for o in objects}
    return image, f"list the {what}s", grid(cells), "grid"


def vqa(rng, level):
    if level == "grid":
        return scene_grid(rng)
    if level == "caption":
        image, objects = scene(rng, int(rng.integers(2, 6)))
        ordered = sorted(objects, key=lambda o: (o.center[1] > IMAGE_SIZE / 2, o.center[0]))
        return (
            image,
            "describe the shapes",
            " , ".join(f"{o.name} {o.place}" for o in ordered),
            "caption",
        )
    count = int(rng.integers(1, 3) if level == "easy" else rng.integers(3, 6))
    kind = choice(rng, ("color", "shape", "count", "count", "place", "relation"))
    if kind == "count":
        few = [list(COLORS)[i] for i in rng.permutation(len(COLORS))[:3]]
        image, objects = scene(rng, count, colors=few, shapes=SHAPES[:4])
        if rng.random() < 0.5:
            word = choice(rng, few)
            return (
                image,
                f"how many {word} shapes ?",
                str(sum(o.color == word for o in objects)),
                kind,
            )
        word = choice(rng, SHAPES[:4])
        return image, f"how many {word}s ?", str(sum(o.shape == word for o in objects)), kind
    image, objects = scene(rng, count)
    item = objects[0]
    if kind == "relation" and len(objects) > 1:
        axis = int(rng.integers(2))
        words = ("left of", "right of") if axis == 0 else ("above", "below")
        side = int(rng.integers(2))
        first, second = item.center[axis], objects[1].center[axis]
        if abs(first - second) >= 4:
            truth = (first < second) == (side == 0)
            return (
                image,
                f"is the {item.name} {words[side]} the {objects[1].name} ?",
                "yes" if truth else "no",
                kind,
            )
    if kind == "color" and sum(o.shape == item.shape for o in objects) == 1:
        return image, f"what color is the {item.shape} ?", item.color, kind
    if kind == "shape" and sum(o.color == item.color for o in objects) == 1:
        return image, f"what shape is {item.color} ?", item.shape, kind
    return image, f"where is the {item.name} ?", item.place, "place"


def grounding(rng, level):
    if level == "grid":
        return scene_grid(rng)
    if level == "caption":
        image, objects = scene(rng, int(rng.integers(2, 6)))
        ordered = sorted(objects, key=lambda o: (o.center[1] > IMAGE_SIZE / 2, o.center[0]))
        parts = (f"{o.name} {locations(o.center)}" for o in ordered)
        return image, "point to the shapes", " , ".join(parts), "caption"
    image, objects = scene(rng, int(rng.integers(1, 3) if level == "easy" else rng.integers(3, 6)))
    item, kind, phrase = objects[0], "name", f"the {objects[0].name}"
    if level != "easy" and rng.random() < 0.4:
        word = choice(rng, list(SIDES))
        axis, sign = SIDES[word]
        ranked = sorted(objects, key=lambda o: sign * o.center[axis], reverse=True)
        if abs(ranked[0].center[axis] - ranked[1].center[axis]) >= 3:
            item, kind, phrase = ranked[0], "side", f"the {word} shape"
    return image, f"find {phrase}", locations(item.box), kind
