"""What charts are drawn on: matplotlib's artists, placed in pixels, and what each cell shows.

All charts share one Agg renderer (so no two threads may draw), and a word is drawn once and then
stamped: a figure with axes of its own takes several times as long.
"""

from functools import cache

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from PIL import Image

from optmerge_core.benchmark.tasks.english.drawing import CELL, CELLS, IMAGE_SIZE, Drawing, covered
from optmerge_core.benchmark.tasks.english.lettering import font_path
from optmerge_core.benchmark.tasks.scenes import choice

COLORS = {
    "red": (0.84, 0.19, 0.19),
    "blue": (0.2, 0.36, 0.82),
    "green": (0.18, 0.6, 0.27),
    "orange": (0.95, 0.52, 0.12),
    "purple": (0.55, 0.27, 0.68),
    "yellow": (0.93, 0.79, 0.2),
    "pink": (0.95, 0.55, 0.75),
    "brown": (0.5, 0.32, 0.2),
    "gray": (0.55, 0.55, 0.55),
    "black": (0.1, 0.1, 0.1),
}
FACES = {"sans": 10, "serif": 10, "stix bold": 11, "modern sans": 12}  # their sizes in pixels
GROUNDS = ((1, 1, 1), (0.97, 0.97, 0.94), (0.93, 0.95, 1), (1, 0.97, 0.9), (0.93, 0.93, 0.93))
INKS = ((25, 25, 25), (60, 60, 75), (25, 40, 90))
STYLE = {  # matplotlib's own, whatever a notebook has set
    key: value
    for key, value in matplotlib.rcParamsDefault.items()
    if key.split(".")[0] in ("agg", "lines", "markers", "patch", "path", "text")
}
LINE = 8  # pixels under a text's baseline on its stamp


@cache
def _figure():
    return Figure(figsize=(1, 1), dpi=72)  # a point is a pixel


@cache
def _renderer(width, height):
    return RendererAgg(width, height, 72)


@cache
def stamp(text, face):
    """A text as a mask, 24 pixels high, cut to its width, its baseline LINE above the bottom."""
    renderer = _renderer(128, 24)
    renderer.clear()
    letters = FontProperties(fname=font_path(face), size=FACES[face])
    artist = Text(4, LINE, text, fontproperties=letters, parse_math=False)
    artist.set_figure(_figure())
    artist.draw(renderer)
    mask = Image.fromarray(np.asarray(renderer.buffer_rgba())[..., 3].copy())
    left, _, right, _ = mask.getbbox()
    return mask.crop((left, 0, right, 24))


class Easel:
    """A chart under way; positions are pixels from the left and from the bottom."""

    def __init__(self, rng):
        self.face, self.ink = choice(rng, tuple(FACES)), choice(rng, INKS)
        self.cells, self.stamps = {}, []
        self.renderer = _renderer(IMAGE_SIZE, IMAGE_SIZE)
        self.renderer.clear()
        self.rectangle((-1, -1, IMAGE_SIZE + 1, IMAGE_SIZE + 1), choice(rng, GROUNDS))

    def add(self, artist):
        artist.set_figure(_figure())
        artist.draw(self.renderer)

    def rectangle(self, box, color, edge="none"):
        left, bottom, right, top = box
        size = right - left, top - bottom
        self.add(Rectangle((left, bottom), *size, facecolor=color, edgecolor=edge, linewidth=0.8))

    def bar(self, box, color, name):
        """A box of a colour with a name."""
        self.rectangle(box, COLORS[color])
        self.show(box, color, name)

    def line(self, xs, ys, color=None, width=1.0, **marks):
        color = color or [v / 255 for v in self.ink]
        self.add(Line2D(xs, ys, color=color, linewidth=width, linestyle="-", **marks))

    def width(self, text):
        return stamp(text, self.face).width

    def text(self, x, y, text, across="center", ink=None):
        """A text around, left or right of x, the middle of its capitals at y; never cut off.

        The cells name it without a sign of percent.
        """
        mask = stamp(str(text), self.face)
        left = x - mask.width * {"left": 0, "center": 0.5, "right": 1}[across]
        left = min(max(round(left), 0), IMAGE_SIZE - mask.width)
        top = round(IMAGE_SIZE - y - (24 - LINE - 4))
        self.stamps.append((ink or self.ink, (left, top), mask))
        self.show((left, y - 5, left + mask.width, y + 5), str(text).rstrip("%"), first=True)

    def show(self, box, *names, first=False):
        """Name a box (left, bottom, right, top) in the cell of its middle and those it covers."""
        left, bottom, right, top = box
        middle = (IMAGE_SIZE - (bottom + top) / 2, (left + right) / 2)
        places = [tuple(min(max(int(v // CELL), 0), CELLS - 1) for v in middle)]
        places += covered((left, IMAGE_SIZE - top, right, IMAGE_SIZE - bottom), 0.3)
        for place in dict.fromkeys(places):
            known = self.cells.get(place, [])
            new = [name for name in names if name not in known]
            self.cells[place] = [*new, *known] if first else [*known, *new]

    def drawing(self, turns):
        """The finished picture; a cell names three things at most, texts before others."""
        image = Image.fromarray(np.asarray(self.renderer.buffer_rgba())).convert("RGB")
        for ink, place, mask in self.stamps:
            image.paste(ink, (*place, place[0] + mask.width, place[1] + mask.height), mask)
        return Drawing(image, turns, {place: names[:3] for place, names in self.cells.items()})
