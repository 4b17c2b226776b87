"""Diagrams and words: labelled figures (Geometry), bars, lines and pies (Chart), strings (OCR).

Like `vqa` and `grounding` in `scenes.py`, `geometry`, `chart` and `ocr` take a numpy random
generator and a level and return (image, question, answer, kind).
"""

import math

import numpy as np
from PIL import Image

from .scenes import (
    CELL,
    CHARACTERS,
    COLORS,
    FONTS,
    IMAGE_SIZE,
    ORDINALS,
    canvas,
    choice,
    font,
    grid,
    tint,
)

# ---------------------------------------------------------------- geometry


def label(draw, xy, text, size=11):
    draw.text(xy, str(text), fill=(20, 20, 20), font=font(size), anchor="mm")


def polygon_figure(rng, form, sides):
    """A square, rectangle or triangle with its sides written beside it (base first)."""
    image, draw = canvas(rng)
    ink = tint(rng, choice(rng, list(COLORS)))
    w, h, x, y = (size + int(rng.integers(-1, 2)) for size in (28, 28, 15, 8))
    if form == "triangle":  # two labels: base and height of a right triangle; three: its sides
        top = x if len(sides) == 2 else x + w / 2
        draw.polygon([(top, y), (x, y + h), (x + w, y + h)], outline=ink)
    else:
        draw.rectangle((x, y, x + w, y + h), outline=ink)
    label(draw, (x + w / 2, y + h + 7), sides[0])
    if len(sides) == 2:
        label(draw, (x - 6, y + h / 2), sides[1])
    if len(sides) == 3:
        label(draw, (x + w / 4 - 6, y + h / 2 - 3), sides[1])
        label(draw, (x + 3 * w / 4 + 6, y + h / 2 - 3), sides[2])
    return image


def segment_figure(rng, length):
    """A line with a tick at every unit, horizontal or vertical."""
    image, draw = canvas(rng)
    unit = 5
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
    top, flip = int(rng.integers(20, 36)), rng.random() < 0.5
    mirror = (lambda p: (IMAGE_SIZE - 1 - p[0], p[1])) if flip else (lambda p: p)
    draw.polygon(
        [mirror(p) for p in ((2, 50), (53, 50), (top, 6))],
        outline=tint(rng, choice(rng, list(COLORS))),
    )
    label(draw, mirror((16, 43)), a, 9)
    label(draw, mirror((40, 43)), b, 9)
    return image


def geometry(rng, level):
    kind = choice(rng, ("length", "angle", "perimeter", "area", "area", "perimeter", "third angle"))
    if kind == "length":
        length = int(rng.integers(1, 5) if level == "easy" else rng.integers(2, 10))
        return segment_figure(rng, length), "how long is the line ?", str(length), kind
    if kind == "angle":
        degrees = 30 * int(rng.integers(1, 6)) if level == "easy" else 10 * int(rng.integers(2, 17))
        return angle_figure(rng, degrees), "what is the angle ?", str(degrees), kind
    if kind == "third angle":
        a, b = (10 * int(v) for v in rng.integers(3, 9, 2))
        image = triangle_angles(rng, a, b)
        if level in ("medium", "full"):
            return image, "what is the missing angle ?", str(180 - a - b), kind
        return (
            image,
            "which angles are written ?",
            " and ".join(str(v) for v in sorted((a, b))),
            "read",
        )
    a, b = (int(v) for v in rng.integers(2, 10, 2))
    c = int(rng.integers(abs(a - b) + 1, min(a + b, 10)))  # a triangle with sides a, b, c exists
    form = choice(rng, ("square", "rectangle", "triangle"))
    triangle = [a, b, c] if kind == "perimeter" else [2 * (a // 2), b]
    sides = {"square": [a], "rectangle": [a, b], "triangle": triangle}[form]
    image = polygon_figure(rng, form, sides)
    if level == "caption" or (level == "easy" and form != "square"):
        return (
            image,
            "which sides are written ?",
            f"{form} {' '.join(str(s) for s in sides)}",
            "read",
        )
    if kind == "perimeter":
        value = {"square": 4 * a, "rectangle": 2 * (a + b), "triangle": sum(sides)}[form]
    else:
        value = {"square": a * a, "rectangle": a * b, "triangle": sides[0] * b // 2}[form]
    return image, f"what is the {kind} of the {form} ?", str(value), kind


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


def bar_chart(rng, level):
    count = 2 if level == "easy" else int(rng.integers(3, 5))
    names = [list(COLORS)[i] for i in rng.permutation(len(COLORS))[:count]]
    image, draw, values = axes(rng, count)
    for i, (name, value) in enumerate(zip(names, values, strict=True)):
        left = 3 + CELL * i
        draw.rectangle((left, height(value), left + 8, 52), tint(rng, name))
    if level == "caption":
        return (
            image,
            "read the chart",
            " , ".join(f"{n} {v}" for n, v in zip(names, values, strict=True)),
            "caption",
        )
    kind = choice(rng, ("value", "value", "compare", "above"))
    if kind == "value":
        i = int(rng.integers(count))
        return image, f"what is the value of the {names[i]} bar ?", str(values[i]), kind
    if kind == "above" and level != "easy":
        limit = choice(rng, (20, 30, 40, 50))
        return (
            image,
            f"how many bars are above {limit} ?",
            str(sum(v > limit for v in values)),
            kind,
        )
    if rng.random() < 0.5:
        return image, "which bar is the highest ?", names[int(np.argmax(values))], "compare"
    return image, "which bar is the lowest ?", names[int(np.argmin(values))], "compare"


def line_chart(rng, level):
    count = 3 if level == "easy" else 4
    image, draw, values = axes(rng, count)
    points = [(7 + CELL * i, height(v)) for i, v in enumerate(values)]
    ink = tint(rng, choice(rng, list(COLORS)))
    draw.line(points, ink, 1)
    for x, y in points:
        draw.rectangle((x - 1, y - 1, x + 1, y + 1), ink)
    if level == "caption":
        return image, "read the chart", " , ".join(str(v) for v in values), "caption"
    if level == "easy" or rng.random() < 0.4:
        if rng.random() < 0.5:
            return (
                image,
                "which point is the highest ?",
                ORDINALS[int(np.argmax(values))],
                "compare",
            )
        return image, "which point is the lowest ?", ORDINALS[int(np.argmin(values))], "compare"
    i = int(rng.integers(count))
    return image, f"what is the value of the {ORDINALS[i]} point ?", str(values[i]), "value"


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
    if level == "caption":
        pairs = sorted(zip(names, shares, strict=True), key=lambda p: -p[1])
        return image, "read the chart", " , ".join(f"{n} {v}" for n, v in pairs), "caption"
    if level == "easy" or rng.random() < 0.4:
        if rng.random() < 0.5:
            return image, "which slice is the largest ?", names[int(np.argmax(shares))], "compare"
        return image, "which slice is the smallest ?", names[int(np.argmin(shares))], "compare"
    i = int(rng.integers(count))
    return image, f"how many percent is the {names[i]} slice ?", str(shares[i]), "percent"


def chart(rng, level):
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
        return image, "list the letters", grid(dict(zip(places, text, strict=True))), level
    if level in ("medium", "full"):
        if rng.random() < 0.3:
            draw.line(
                [tuple(int(v) for v in rng.integers(0, IMAGE_SIZE, 2)) for _ in range(2)], ink
            )
        pixels = np.array(image)
        dots = rng.random(pixels.shape[:2]) < rng.uniform(0, 0.04)
        pixels[dots] = ink
        image = Image.fromarray(pixels)
    if level != "caption" and rng.random() < 0.3:
        i = int(rng.integers(length))
        return image, f"what is the {ORDINALS[i]} letter ?", text[i], "letter"
    return image, "read the text", text, "read"
