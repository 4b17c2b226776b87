"""Scenes of coloured shapes, for VQA and Grounding, and what all drawings share.

`vqa` and `grounding` take a numpy random generator and a level and return a 56 x 56 RGB image and
a conversation about it: up to TURNS turns (question, answer, kind). Levels: `grid` and `caption`
describe everything, cell by cell or thing by thing; `easy` asks every kind of question about few
things; `medium` shows as many things as `full`, the task proper, but keeps some kinds of question
for the experts.
"""

from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

IMAGE_SIZE = 56
CELL = 14  # pixels of the image that one image token stands for, each way
BIN = 4  # pixels per location token: boxes are quantised to multiples of it
TURNS = 4  # questions asked about one training image at most; evaluation asks the first alone

COLORS = {
    "red": (214, 48, 48),
    "green": (46, 160, 67),
    "blue": (52, 92, 210),
    "yellow": (228, 196, 40),
    "purple": (142, 68, 173),
    "orange": (236, 128, 36),
}
PLURALS = {
    "circle": "circles",
    "square": "squares",
    "triangle": "triangles",
    "diamond": "diamonds",
    "cross": "crosses",
}
SHAPES = tuple(PLURALS)
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


def converse(rng, questions, weights):
    """Up to TURNS of `questions`, none twice: each time a kind by its weight, then one of the kind.

    questions: [(question, answer, kind)]; weights: {kind: weight}, kinds it lacks are not asked.
    """
    left = [q for q in questions if q[2] in weights]
    turns = []
    while left and len(turns) < TURNS:
        kinds = [k for k in weights if any(q[2] == k for q in left)]
        shares = np.cumsum([weights[k] for k in kinds])
        kind = kinds[int(np.searchsorted(shares, rng.random() * shares[-1], side="right"))]
        turns.append(choice(rng, [q for q in left if q[2] == kind]))
        left.remove(turns[-1])
    return turns


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


def many_shapes(rng, level):
    """1 or 2 things (easy), or 3 to 5 of only 3 colours and 4 shapes, so that some are shared."""
    if level == "easy":
        return scene(rng, int(rng.integers(1, 3)))
    colors = [list(COLORS)[i] for i in rng.permutation(len(COLORS))[:3]]
    shapes = [SHAPES[i] for i in rng.permutation(len(SHAPES))[:4]]
    return scene(rng, int(rng.integers(3, 6)), colors, shapes)


def describe(rng, question, tell):
    """A scene with all its shapes told, top half first, each half from left to right."""
    image, objects = scene(rng, int(rng.integers(2, 6)))
    ordered = sorted(objects, key=lambda o: (o.center[1] > IMAGE_SIZE / 2, o.center[0]))
    return image, [(question, " , ".join(f"{o.name} {tell(o)}" for o in ordered), "caption")]


def scene_grid(rng):
    """The colours, or the shapes, of all 16 cells of a scene."""
    image, objects = scene(rng, int(rng.integers(4, 11)))
    what = choice(rng, ("color", "shape"))
    cells = {(o.box[0] // CELL, o.box[1] // CELL): getattr(o, what) for o in objects}
    return image, [(f"list the {what}s", grid(cells), "grid")]


def relations(first, second):
    """Where `first` is, seen from `second`: two questions per axis on which they differ clearly."""
    for axis, words in enumerate((("left of", "right of"), ("above", "below"))):
        if abs(first.center[axis] - second.center[axis]) >= 4:
            truth = first.center[axis] < second.center[axis]
            for word, answer in zip(words, (truth, not truth), strict=True):
                question = f"is the {first.name} {word} the {second.name} ?"
                yield question, "yes" if answer else "no", "relation"


def vqa(rng, level):
    if level == "grid":
        return scene_grid(rng)
    if level == "caption":
        return describe(rng, "describe the shapes", lambda o: o.place)
    image, objects = many_shapes(rng, level)
    colors, shapes = ([getattr(o, w) for o in objects] for w in ("color", "shape"))
    asked = [(f"where is the {o.name} ?", o.place, "place") for o in objects]
    for o in objects:
        if shapes.count(o.shape) == 1:
            asked.append((f"what color is the {o.shape} ?", o.color, "color"))
        if colors.count(o.color) == 1:
            asked.append((f"what shape is {o.color} ?", o.shape, "shape"))
    for words, names, thing in ((COLORS, colors, "{} shapes"), (SHAPES, shapes, "{}")):
        present = sorted(set(names))
        absent = choice(rng, [w for w in words if w not in present])
        for word in [*present, absent]:
            question = f"how many {thing.format(PLURALS.get(word, word))} ?"
            asked.append((question, str(names.count(word)), "count"))
    for first in objects:
        asked += [q for o in objects if o != first for q in relations(first, o)]
    weights = {"place": 1, "color": 1, "shape": 1}
    if level != "medium":
        weights |= {"count": 2, "relation": 1}
    return image, converse(rng, asked, weights)


def outermost(objects, side):
    """The shape farthest to a side; None if two are about as far."""
    axis, sign = SIDES[side]
    first, *others = sorted(objects, key=lambda o: -sign * o.center[axis])
    clear = all(abs(first.center[axis] - o.center[axis]) >= 3 for o in others[:1])
    return first if clear else None


def grounding(rng, level):
    if level == "grid":
        return scene_grid(rng)
    if level == "caption":
        return describe(rng, "point to the shapes", lambda o: locations(o.center))
    image, objects = many_shapes(rng, level)
    asked = [(f"find the {o.name}", locations(o.box), "name") for o in objects]
    for side in SIDES:
        if found := outermost(objects, side):
            asked.append((f"find the {side} shape", locations(found.box), "side"))
    weights = {"name": 3} if level == "medium" else {"name": 3, "side": 2}
    return image, converse(rng, asked, weights)
