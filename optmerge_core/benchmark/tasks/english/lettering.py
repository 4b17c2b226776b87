"""Letters and words of the study `smol`: its word list, its fonts, and handwriting.

The fonts are those that matplotlib ships, taken by their path, and two faces of the Hershey fonts
(strokes, public domain) as handwriting: the same on every machine.
"""

import json
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from optmerge_core.benchmark.tasks.english.drawing import CELL, reserved
from optmerge_core.places import checkout

FACES = {
    "sans": "DejaVuSans",
    "bold": "DejaVuSans-Bold",
    "oblique": "DejaVuSans-Oblique",
    "mono": "DejaVuSansMono",
    "serif": "DejaVuSerif",
    "serif bold": "DejaVuSerif-Bold",
    "stix": "STIXGeneral",
    "stix bold": "STIXGeneralBol",
    "stix italic": "STIXGeneralItalic",
    "modern": "cmr10",
    "modern bold": "cmb10",
    "modern sans": "cmss10",
    "typewriter": "cmtt10",
}
HANDS = ("script", "print")  # handwriting: joined letters, separate letters
CAPITAL, BASELINE = 21, 9  # of the Hershey fonts: height of a capital, y of the line under it
FINE = 4  # handwriting is drawn this much larger first, for smooth strokes


@cache
def words(group):
    """The words of a group of data/benchmark/smol/words.txt, as a tuple."""
    lines = _data("words.txt").splitlines()
    groups = dict(line.split(": ") for line in lines if not line.startswith("#"))
    return tuple(groups[group].split())


def allowed(rng, split, make, *tags, share=0.5):
    """What `make()` gives, drawn anew until the split may show it, by the hash of tags and text.

    Training and validation never get a reserved one; a test gets one in `share` of the calls.
    """
    wanted = split == "test" and rng.random() < share
    while reserved(*tags, text := make()) != wanted:
        pass
    return text


def font_path(face):
    return str(Path(matplotlib.get_data_path(), "fonts", "ttf", f"{FACES[face]}.ttf"))


@cache
def font(face, height):
    """A font whose capitals are `height` pixels high."""

    def sized(size):
        return ImageFont.truetype(font_path(face), size, layout_engine=ImageFont.Layout.BASIC)

    capital = -sized(200).getbbox("H", anchor="ls")[1] / 200
    return sized(round(height / capital))


@cache
def _data(name):
    return (checkout() / "data" / "benchmark" / "smol" / name).read_text(encoding="utf-8")


@cache
def _strokes(hand):
    """Character -> (width, strokes, each (points, 2), from its left edge and baseline, y down)."""
    return {
        character: (width, [np.array(points, float) - (left, BASELINE) for points in strokes])
        for character, (left, width, strokes) in json.loads(_data("handwriting.json"))[hand].items()
    }


def advances(text, face, height):
    """Where each character of a line of text begins, and the line ends: pixels from its start."""
    if face in HANDS:
        widths = [_strokes(face)[c][0] * height / CAPITAL for c in text]
        return np.concatenate([[0.0], np.cumsum(widths)])
    return np.array([font(face, height).getlength(text[:i]) for i in range(len(text) + 1)])


def write(rng, image, text, face, height, start, ink):
    """Write a line at `start` (its left end, its baseline), in pixels -> [(character, cell)].

    A character's cell (row, column) is the one that its middle lies in.
    """
    x, y = start
    ends = x + advances(text, face, height)
    if face in HANDS:
        _handwrite(rng, image, text, face, height, ends[:-1], y, ink)
    else:
        ImageDraw.Draw(image).text(start, text, ink, font(face, height), anchor="ls")
    row = int((y - height / 2) // CELL)
    middles = (ends[1:] + ends[:-1]) / 2
    return [(c, (row, int(m // CELL))) for c, m in zip(text, middles, strict=True) if c != " "]


def _handwrite(rng, image, text, hand, height, lefts, y, ink):
    """Strokes of unsteady height, slant and slope, some 1.5 pixels wide."""
    unit = height / CAPITAL
    slant, slope, width = rng.uniform(-0.1, 0.25), rng.uniform(-0.03, 0.03), rng.uniform(1.2, 2)
    left, top = int(lefts[0]) - 12, int(y - 1.6 * height)
    right, bottom = int(lefts[-1] + 1.5 * height) + 12, int(y + 0.9 * height)
    mask = Image.new("L", (FINE * (right - left), FINE * (bottom - top)))
    draw = ImageDraw.Draw(mask)
    for character, x in zip(text, lefts, strict=True):
        size = unit * rng.uniform(0.93, 1.07)
        drop = rng.normal(0, 0.4) + slope * (x - lefts[0])
        for points in _strokes(hand)[character][1]:
            points = points + rng.normal(0, 0.18, points.shape)
            across = x - left + size * (points[:, 0] - slant * points[:, 1])
            down = y - top + drop + size * points[:, 1]
            line = [(float(FINE * a), float(FINE * d)) for a, d in zip(across, down, strict=True)]
            draw.line(line, 255, round(FINE * width), joint="curve")
    image.paste(ink, (left, top), mask.reduce(FINE))


def fitting(rng, text, face, heights, room):
    """A face and a height of capitals at which a line fits into `room` pixels.

    heights: (least, most). Joined handwriting needs 15 pixels to be legible: where that is too
    wide it becomes separate letters, and what is too wide at 11 pixels narrow print.
    """
    height = int(rng.integers(heights[0], heights[1] + 1))
    for hand, least in ((face, 15 if face == "script" else 11), ("print", 11), ("stix", 9)):
        if hand == "print" and face != "script":
            continue
        for size in range(max(height, least), least - 1, -1):
            if advances(text, hand, size)[-1] <= room:
                return hand, size
    raise ValueError(f"{text!r} is too long for {room} pixels; write it in two lines")
