"""Things set in a picture: where, how large, before which background, and on what."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image, ImageDraw

from optmerge_core.benchmark.tasks.english.drawing import CELL, CELLS, IMAGE_SIZE
from optmerge_core.benchmark.tasks.english.things import (
    PAINTS,
    Thing,
    kept_place,
    opaque,
    picture,
)
from optmerge_core.benchmark.tasks.scenes import choice

GROUNDS = {
    "red": (222, 62, 56),
    "orange": (244, 146, 40),
    "yellow": (250, 216, 62),
    "green": (70, 172, 84),
    "blue": (62, 112, 224),
    "purple": (142, 78, 188),
    "pink": (246, 150, 196),
}
"""Colours of the circle or square that a thing may stand on."""
UNLIKE = {
    "brown": ("orange", "red"),
    "orange": ("red", "yellow"),
    "pink": ("red",),
    "red": ("orange", "pink"),
    "yellow": ("orange",),
}
"""Grounds too near to a thing of a colour, beside its own colour."""
SIZES = {1: (36, 56), 2: (32, 50), 3: (28, 46), 4: (26, 42), 5: (24, 36), 6: (24, 34)}
"""Things in a picture -> pixels of the longer side of one, with what it stands on."""
GAP = 2  # pixels between two things at least
JITTER = 5  # pixels: what is in one column of ninths is then never called left or right of another
THIRDS = (("top left", "top", "top right"), ("left", "middle", "right"))
THIRDS += (("bottom left", "bottom", "bottom right"),)


def region(center):
    """The ninth of the picture where a point lies, in words."""
    x, y = (min(int(3 * v / IMAGE_SIZE), 2) for v in center)
    return THIRDS[y][x]


@dataclass(frozen=True)
class Item:
    """A thing in a picture; boxes in pixels: left, top, right, bottom.

    color: its own, or empty. ground: (colour, shape) of what it stands on, or None; outer: its box.
    """

    thing: Thing
    color: str
    box: tuple[int, int, int, int]
    ground: tuple[str, str] | None
    outer: tuple[int, int, int, int]

    @property
    def name(self):
        return self.thing.name

    @cached_property
    def full_name(self):
        """With its colour, if things of its name come in several."""
        return f"{self.color} {self.name}" if self.thing.varies else self.name

    @cached_property
    def center(self):
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2

    @cached_property
    def region(self):
        """The ninth where it lies, with what it stands on."""
        return region(((self.outer[0] + self.outer[2]) / 2, (self.outer[1] + self.outer[3]) / 2))

    @cached_property
    def size(self):
        return max(self.box[2] - self.box[0], self.box[3] - self.box[1])


@dataclass
class Scene:
    image: Image.Image
    items: list[Item]
    cells: dict[tuple[int, int], list[str]]
    boxes: dict[tuple[int, int], tuple[int, int, int, int]]

    def reading_order(self):
        return sorted(self.items, key=lambda i: (int(3 * i.center[1] / IMAGE_SIZE), i.center[0]))


# ---------------------------------------------------------------- backgrounds


def _pale(rng):
    """A colour that is neither strong nor dark, float (3,)."""
    return np.clip(rng.integers(168, 250) + rng.integers(-28, 29, 3), 130, 255).astype(float)


def background(rng):
    """RGB, plain, shaded from one colour to another, striped, chequered, dotted or grainy."""
    first, second = _pale(rng), _pale(rng)
    y, x = np.indices((IMAGE_SIZE, IMAGE_SIZE))
    kind = int(rng.integers(7))
    step, slope = int(rng.integers(5, 15)), choice(rng, ((1, 0), (0, 1), (1, 1), (1, -1)))
    along = slope[0] * x + slope[1] * y
    if kind == 0:
        share = np.zeros_like(x, float)
    elif kind == 1:
        share = (along - along.min()) / (along.max() - along.min())
    elif kind == 2:
        share = (along // step % 2) * 0.5
    elif kind == 3:
        share = (x // step + y // step) % 2 * 0.5
    elif kind == 4:
        share = ((x % (2 * step) - step) ** 2 + (y % (2 * step) - step) ** 2 < step**2 / 4) * 0.6
    elif kind == 5:
        share = rng.integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE)) / 640
    else:  # land below sky
        share = y >= int(rng.integers(40, 90))
    pixels = first + (second - first) * share[..., None]
    return Image.fromarray(pixels.round().astype(np.uint8))


# ---------------------------------------------------------------- places


def _meet(a, b):
    return a[0] < b[2] + GAP and b[0] < a[2] + GAP and a[1] < b[3] + GAP and b[1] < a[3] + GAP


def _free_box(rng, name, size, taken, anywhere):
    """A box of a size (width, height) that meets none of those taken; None if none was found."""
    for _ in range(40):
        left, top = (int(rng.integers(1, IMAGE_SIZE - s)) for s in size)
        box = (left, top, left + size[0], top + size[1])
        center = (left + size[0] / 2, top + size[1] / 2)
        if any(_meet(box, other) for other in taken):
            continue
        if anywhere or not kept_place(name, region(center)):
            return box
    return None


def _places(rng, names, sizes, anywhere):
    """A box for each thing, in the order given: sizes are (width, height) at most.

    Everything gets smaller, and begins anew, until all find a place.
    """
    shrink = 1.0
    while True:
        boxes = []
        for name, size in zip(names, sizes, strict=True):
            smaller = tuple(max(round(s * shrink), 4) for s in size)
            box = _free_box(rng, name, smaller, boxes, anywhere)
            if box is None:
                break
            boxes.append(box)
        else:
            return boxes
        shrink *= 0.95


def _in_ninths(rng, names, sizes, anywhere):
    """A box for each thing in a ninth of its own, at most JITTER pixels from its middle.

    So the ninths tell what is left of what, and what is outermost.
    """
    words = [word for row in THIRDS for word in row]
    while True:
        chosen = rng.permutation(len(words))[: len(names)].tolist()
        if anywhere or not any(kept_place(n, words[i]) for n, i in zip(names, chosen, strict=True)):
            break
    boxes = []
    for i, size in zip(chosen, sizes, strict=True):
        middles = ((i % 3 + 0.5) * IMAGE_SIZE / 3, (i // 3 + 0.5) * IMAGE_SIZE / 3)
        free = (min(JITTER, (IMAGE_SIZE / 3 - s) / 2) for s in size)
        moved = [m + rng.uniform(-f, f) for m, f in zip(middles, free, strict=True)]
        left, top = (round(m - s / 2) for m, s in zip(moved, size, strict=True))
        boxes.append((left, top, left + size[0], top + size[1]))
    return boxes


# ---------------------------------------------------------------- the picture


def _figure(rng, look, paint):
    """A thing's picture, mirrored or turned a little half of the time each, without margin."""
    figure = picture(look, paint)
    if rng.random() < 0.5:
        figure = figure.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < 0.4:
        angle = int(rng.integers(-14, 15))
        figure = figure.rotate(angle, Image.Resampling.BICUBIC, expand=True)
        figure = figure.crop(opaque(figure))
    return figure


def _ground(rng, color, share):
    """(colour, shape) of what a thing stands on, unlike the thing's own colour; or None."""
    if rng.random() >= share:
        return None
    fitting = [c for c in GROUNDS if c != color and c not in UNLIKE.get(color, ())]
    return choice(rng, fitting), choice(rng, ("circle", "square"))


def _within(outer, figure, ground):
    """The figure's box in the middle of the box it has, three quarters of it if on a ground."""
    width, height = outer[2] - outer[0], outer[3] - outer[1]
    scale = min(width / figure.width, height / figure.height) * (0.76 if ground else 1)
    w, h = max(round(figure.width * scale), 1), max(round(figure.height * scale), 1)
    left, top = outer[0] + (width - w) // 2, outer[1] + (height - h) // 2
    return left, top, left + w, top + h


def _cells(items, masks):
    """What each cell shows: what covers most of it, a seventh at least, things before grounds.

    A thing so thin that no cell would show it is in the one it covers most. Returns what names the
    cells, and of those where a thing is seen its box.
    """
    found = {}
    for item, pair in zip(items, masks, strict=True):
        own = [item.name, *([item.color] if item.color and not item.ground else [])]
        under = list(item.ground or ())
        thing, ground = (
            np.asarray(mask).reshape(CELLS, CELL, CELLS, CELL).mean((1, 3)) / 255 for mask in pair
        )
        seen = thing >= min(1 / 7, thing.max())
        for row, column in np.argwhere(seen | (ground >= 1 / 4)).tolist():
            words = own * bool(seen[row, column]) + under * bool(ground[row, column] >= 1 / 7)
            share = max(thing[row, column], ground[row, column])
            box = item.box if seen[row, column] else ()
            found.setdefault((row, column), []).append((share, words[:3], box))
    shown = {cell: max(entries) for cell, entries in sorted(found.items())}
    return {c: words for c, (_, words, _) in shown.items()}, {
        c: box for c, (_, _, box) in shown.items() if box
    }


def stage(rng, cast, split, grounds=0.4, ninths=False):
    """A scene of the cast, [(Thing, Look, paint)]; a share of them on a circle or square.

    Things that vary in colour stand on the bare background, so that their colour is the only one.
    In training and validation nothing stands in a place that is kept for the test. ninths: each
    thing in a ninth of its own, as small as where there are many.
    """
    image, low, high = background(rng), *SIZES[max(SIZES) if ninths else len(cast)]
    figures = [_figure(rng, look, paint) for _, look, paint in cast]
    colors = [paint or look.color for _, look, paint in cast]
    under = [_ground(rng, look.near, 0 if thing.varies else grounds) for thing, look, _ in cast]
    sizes = []
    for figure, ground in zip(figures, under, strict=True):
        side = int(rng.integers(max(low, 30) if ground else low, high + 1))
        longer = max(figure.size)
        scaled = tuple(round(side * s / longer) for s in figure.size)
        sizes.append((side, side) if ground else scaled)
    place = _in_ninths if ninths else _places
    outers = place(rng, [thing.name for thing, *_ in cast], sizes, split == "test")
    items, masks = [], []
    for (thing, *_), figure, color, ground, outer in zip(
        cast, figures, colors, under, outers, strict=True
    ):
        box = _within(outer, figure, ground)
        items.append(Item(thing, color, box, ground, outer))
        masks.append(_draw(rng, image, figure, items[-1]))
    return Scene(image, items, *_cells(items, masks))


def _draw(rng, image, figure, item):
    """Draw an item; returns the masks (L) of the thing and of what it stands on."""
    thing, ground = (Image.new("L", image.size) for _ in range(2))
    if item.ground:
        color, shape = item.ground
        left, top, right, bottom = item.outer
        draw = ImageDraw.Draw(ground)
        form = draw.ellipse if shape == "circle" else draw.rectangle
        form((left, top, right - 1, bottom - 1), 255)
        tint = np.clip(np.array(GROUNDS[color]) + rng.integers(-12, 13, 3), 0, 255)
        image.paste(tuple(tint.tolist()), mask=ground)
    box = item.box
    figure = figure.resize((box[2] - box[0], box[3] - box[1]), Image.Resampling.BICUBIC)
    image.paste(figure, box, figure)
    thing.paste(figure.getchannel("A"), box)
    return thing, ground


def look_of(rng, thing, color=""):
    """(Thing, Look, paint) of one picture of a thing, in a colour if one is asked for."""
    if thing.painted:
        return thing, thing.looks[0], color or choice(rng, list(PAINTS))
    looks = [look for look in thing.looks if color in ("", look.color)]
    return thing, choice(rng, looks), ""
