"""Diagrams and words: labelled figures (Geometry), bars, lines and pies (Chart), strings (OCR).

Like `vqa` and `grounding` in `scenes.py`, `geometry`, `chart` and `ocr` take a numpy random
generator and a level and return an image and a conversation about it.
"""

import math

import numpy as np
from PIL import Image

from optmerge_core.benchmark.tasks.scenes import (
    CELL,
    CHARACTERS,
    COLORS,
    FONTS,
    IMAGE_SIZE,
    ORDINALS,
    canvas,
    choice,
    converse,
    font,
    grid,
    tint,
)

# ---------------------------------------------------------------- geometry


def label(draw, rng, cell, text):
    """Text in the middle of a cell (column, row) of the image, up to a pixel beside it."""
    x, y = (CELL * c + CELL / 2 + int(rng.integers(-1, 2)) for c in cell)
    size = 11 if len(str(text)) == 1 else 10
    draw.text((x, y), str(text), fill=(20, 20, 20), font=font(size), anchor="mm")


def number_grid(rng):
    """Numbers of one and two digits in some of the 16 cells, to be listed."""
    image, draw = canvas(rng)
    cells = [divmod(int(c), 4)[::-1] for c in rng.permutation(16)[: rng.integers(5, 11)]]
    tens = rng.random(len(cells)) < 0.4
    numbers = [
        str(10 * int(v) if t else int(v))
        for v, t in zip(rng.integers(2, 10, len(cells)), tens, strict=True)
    ]
    for cell, number in zip(cells, numbers, strict=True):
        label(draw, rng, cell, number)
    return image, [("list the numbers", grid(dict(zip(cells, numbers, strict=True))), "grid")]


def polygon_figure(rng, form, sides):
    """A square, rectangle or triangle with its sides written beside it (base first)."""
    image, draw = canvas(rng)
    ink = tint(rng, choice(rng, list(COLORS)))
    column = int(rng.integers(1, 3))  # of the base's label
    if len(sides) == 3:  # a triangle with three sides
        draw.polygon([(28, 3), (14, 40), (42, 40)], outline=ink)
        label(draw, rng, (3, 1), sides[2])
    else:
        w, h = (36 + int(rng.integers(-2, 3)) for _ in range(2))
        corners = [(16, 41 - h), (16 + w, 41 - h), (16 + w, 41), (16, 41)]
        if form == "triangle":  # right-angled: base and height
            del corners[1]
        draw.polygon(corners, outline=ink)
    label(draw, rng, (column, 3), sides[0])
    if len(sides) > 1:
        label(draw, rng, (0, 1), sides[1])
    return image


def segment_figure(rng, length):
    """A line with a tick at every unit, horizontal or vertical."""
    image, draw = canvas(rng)
    unit = CELL // 2
    start, across = 3, choice(rng, (14, 28, 42)) + int(rng.integers(-2, 3))
    ink, flip = tint(rng, choice(rng, list(COLORS))), rng.random() < 0.5
    for a, b, c, d in [(start, across, start + unit * length, across)] + [
        (start + unit * i, across - 3, start + unit * i, across + 3) for i in range(length + 1)
    ]:
        draw.line((b, a, d, c) if flip else (a, b, c, d), ink)
    return image


def angle_figure(rng, degrees):
    image, draw = canvas(rng)
    ink, turn = tint(rng, choice(rng, list(COLORS))), 90 * int(rng.integers(4)) + rng.uniform(-5, 5)
    middle = math.radians(turn + degrees / 2)
    x, y = 28 - 9 * math.cos(middle), 28 - 9 * math.sin(middle)
    for a in (turn, turn + degrees):
        draw.line(
            (x, y, x + 25 * math.cos(math.radians(a)), y + 25 * math.sin(math.radians(a))), ink, 2
        )
    draw.arc((x - 9, y - 9, x + 9, y + 9), turn, turn + degrees, (90, 90, 90))
    return image


def triangle_angles(rng, a, b):
    """A triangle with two of its angles written in; the third is asked for."""
    image, draw = canvas(rng)
    draw.polygon(
        [(0, 55), (55, 55), (int(rng.integers(20, 36)), 4)],
        outline=tint(rng, choice(rng, list(COLORS))),
    )
    label(draw, rng, (1, 3), a)
    label(draw, rng, (2, 3), b)
    return image


def geometry(rng, level):
    if level == "grid":
        return number_grid(rng)
    kind = choice(rng, ("length", "angle", "figure", "figure", "figure", "figure", "third angle"))
    if kind == "length":
        length = int(rng.integers(1, 5 if level == "easy" else 8))
        return segment_figure(rng, length), [("how long is the line ?", str(length), kind)]
    if kind == "angle":
        full = level == "full"
        degrees = 10 * int(rng.integers(2, 17)) if full else 30 * int(rng.integers(1, 6))
        return angle_figure(rng, degrees), [("what is the angle ?", str(degrees), kind)]
    reading = level in ("caption", "medium")
    if kind == "third angle":
        a, b = (10 * int(v) for v in rng.integers(3, 6 if level == "easy" else 9, 2))
        asked = ("which angles are written ?", f"{a} and {b}", "read")
        if not reading:
            asked = ("what is the missing angle ?", str(180 - a - b), kind)
        return triangle_angles(rng, a, b), [asked]
    a, b = (int(v) for v in rng.integers(2, 5 if level == "easy" else 10, 2))
    c = int(rng.integers(abs(a - b) + 1, min(a + b, 10)))  # a triangle with sides a, b, c exists
    form = choice(rng, ("square", "rectangle", "triangle"))
    three = form == "triangle" and rng.random() < 0.5
    triangle, half = [2 * (a // 2), b], 2 * (a // 2) * b // 2
    sides, perimeter, area = {
        "square": ([a], 4 * a, a * a),
        "rectangle": ([a, b], 2 * (a + b), a * b),
        "triangle": ([a, b, c], a + b + c, None) if three else (triangle, None, half),
    }[form]
    asked = [
        (f"what is the {kind} of the {form} ?", str(value), kind)
        for kind, value in (("perimeter", perimeter), ("area", area))
        if value is not None
    ]
    if reading:
        asked = [("which sides are written ?", f"{form} {' '.join(map(str, sides))}", "read")]
    return polygon_figure(rng, form, sides), converse(
        rng, asked, {"perimeter": 1, "area": 1, "read": 1}
    )


# ---------------------------------------------------------------- charts


def axes(rng, count):
    """An empty chart with grid lines at 20, 40 and 60, and `count` different values to draw."""
    image, draw = canvas(rng)
    for tick in (20, 40, 60):
        draw.line((1, height(tick), 55, height(tick)), (190, 190, 190))
    draw.line((1, 3, 1, 53), (60, 60, 60))
    draw.line((1, 53, 55, 53), (60, 60, 60))
    return image, draw, [int(v) for v in 10 + 5 * rng.permutation(11)[:count]]


def height(value):
    """The row of pixels at which a value from 0 to 60 lies."""
    return 53 - round(0.8 * value)


def extremes(thing, names, values, words):
    """Which is the largest, and which the smallest?"""
    for word, index in zip(words, (np.argmax(values), np.argmin(values)), strict=True):
        yield f"which {thing} is the {word} ?", names[int(index)], "compare"


def legend(pairs):
    return [("read the chart", " , ".join(f"{n} {v}" for n, v in pairs), "caption")]


def bar_chart(rng, level):
    count = 2 if level == "easy" else int(rng.integers(3, 5))
    names = [list(COLORS)[i] for i in rng.permutation(len(COLORS))[:count]]
    image, draw, values = axes(rng, count)
    for i, (name, value) in enumerate(zip(names, values, strict=True)):
        left = 3 + CELL * i
        draw.rectangle((left, height(value), left + 8, 52), tint(rng, name))
    pairs = list(zip(names, values, strict=True))
    if level == "caption":
        return image, legend(pairs)
    asked = [(f"what is the value of the {n} bar ?", str(v), "value") for n, v in pairs]
    asked += extremes("bar", names, values, ("highest", "lowest"))
    for limit in (20, 30, 40, 50):
        above = str(sum(v > limit for v in values))
        asked.append((f"how many bars are above {limit} ?", above, "above"))
    weights = {"value": 2, "compare": 1} | ({} if level == "medium" else {"above": 1})
    return image, converse(rng, asked, weights)


def line_chart(rng, level):
    count = 3 if level == "easy" else 4
    image, draw, values = axes(rng, count)
    points = [(7 + CELL * i, height(v)) for i, v in enumerate(values)]
    ink = tint(rng, choice(rng, list(COLORS)))
    draw.line(points, ink, 1)
    for x, y in points:
        draw.rectangle((x - 1, y - 1, x + 1, y + 1), ink)
    if level == "caption":
        return image, legend(zip(ORDINALS[:count], values, strict=True))
    pairs = zip(ORDINALS[:count], values, strict=True)
    asked = [(f"what is the value of the {n} point ?", str(v), "value") for n, v in pairs]
    asked += extremes("point", ORDINALS, values, ("highest", "lowest"))
    return image, converse(rng, asked, {"value": 3, "compare": 2})


def pie_chart(rng, level):
    count = 2 if level == "easy" else int(rng.integers(3, 5))
    names = [list(COLORS)[i] for i in rng.permutation(len(COLORS))[:count]]
    while True:  # shares of 5 %, none under 10 %, no two alike
        cuts = np.sort(rng.permutation(19)[: count - 1] + 1) * 5
        shares = np.diff(np.concatenate([[0], cuts, [100]]))
        if shares.min() >= 10 and len(set(shares)) == count:
            break
    image, draw = canvas(rng)
    x, y, r = (centre + int(rng.integers(-1, 2)) for centre in (28, 28, 23))
    angle = -90.0
    for name, share in zip(names, shares, strict=True):
        draw.pieslice((x - r, y - r, x + r, y + r), angle, angle + 3.6 * share, tint(rng, name))
        angle += 3.6 * share
    pairs = list(zip(names, shares, strict=True))
    if level == "caption":
        return image, legend(sorted(pairs, key=lambda p: -p[1]))
    asked = [(f"how many percent is the {n} slice ?", str(v), "percent") for n, v in pairs]
    asked += extremes("slice", names, shares, ("largest", "smallest"))
    weights = {"compare": 2} | ({} if level == "medium" else {"percent": 3})
    return image, converse(rng, asked, weights)


def chart(rng, level):
    level = "caption" if level == "grid" else level
    return choice(rng, (bar_chart, bar_chart, line_chart, pie_chart))(rng, level)


# ---------------------------------------------------------------- text


def ocr(rng, level):
    image, draw = canvas(rng)
    style, size = int(rng.integers(len(FONTS))), int(rng.integers(14, 17))
    ink = tuple(int(v) for v in rng.integers(0, 110, 3))
    shift = rng.integers(-1, 2, 2)
    if level == "grid":
        places = [divmod(int(c), 4)[::-1] for c in rng.permutation(16)[: rng.integers(6, 13)]]
    else:
        length = int(rng.integers(1, 3) if level == "easy" else rng.integers(2, 4))
        length += level == "full"
        first, row = int(rng.integers(0, 5 - length)), int(rng.integers(4))
        places = [(first + i, row) for i in range(length)]
        if level == "full" and rng.random() < 0.5:  # in two lines
            first, row = (int(v) for v in rng.integers(0, 3, 2))
            places = [(first + i % 2, row + i // 2) for i in range(length)]
    text = "".join(CHARACTERS[i] for i in rng.integers(len(CHARACTERS), size=len(places)))
    for (column, row), character in zip(places, text, strict=True):
        x, y = (CELL * place + CELL / 2 for place in (column, row))
        draw.text((x + shift[0], y + shift[1]), character, ink, font(size, style), anchor="mm")
    if level == "grid":
        return image, [("list the letters", grid(dict(zip(places, text, strict=True))), level)]
    if level in ("medium", "full"):
        if rng.random() < 0.3:
            draw.line(
                [tuple(int(v) for v in rng.integers(0, IMAGE_SIZE, 2)) for _ in range(2)], ink
            )
        pixels = np.array(image)
        dots = rng.random(pixels.shape[:2]) < rng.uniform(0, 0.04)
        pixels[dots] = ink
        image = Image.fromarray(pixels)
    asked = [("read the text", text, "read")]
    if level != "caption":
        asked += [
            (f"what is the {ordinal} letter ?", character, "letter")
            for ordinal, character in zip(ORDINALS, text, strict=False)
        ]
    return image, converse(rng, asked, {"read": 7, "letter": 3})
