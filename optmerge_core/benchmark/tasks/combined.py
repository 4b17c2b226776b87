"""Questions that need two abilities at once, which no model was trained on (for Table 10).

Drawn like the tasks of `scenes.py` and `diagrams.py`, at one level, in the words of the two tasks
they combine, with one turn (question, answer, kind).
"""

import numpy as np
from PIL import ImageDraw

from optmerge_core.benchmark.tasks.diagrams import label
from optmerge_core.benchmark.tasks.scenes import (
    CELL,
    CHARACTERS,
    COLORS,
    SIDES,
    canvas,
    choice,
    font,
    locations,
    outermost,
    scene,
    tint,
)


def letters(rng, count):
    """`count` different characters."""
    return [CHARACTERS[i] for i in rng.permutation(len(CHARACTERS))[:count]]


def labelled_bars(rng, level="full"):
    """Chart and OCR: the letter under the highest, or the lowest, bar."""
    image, draw = canvas(rng)
    colors = [list(COLORS)[i] for i in rng.permutation(len(COLORS))[:4]]
    heights, names = 8 + 8 * rng.permutation(4), letters(rng, 4)
    for column, (color, tall, name) in enumerate(zip(colors, heights, names, strict=True)):
        left, floor = 3 + CELL * column, 3 * CELL - 2
        draw.rectangle((left, floor - int(tall), left + 8, floor), tint(rng, color))
        label(draw, rng, (column, 3), name)
    draw.line((1, 3 * CELL - 1, 55, 3 * CELL - 1), (60, 60, 60))
    word, index = choice(rng, (("highest", np.argmax(heights)), ("lowest", np.argmin(heights))))
    return image, [(f"what is the letter of the {word} bar ?", names[int(index)], "letter")]


def labelled_shapes(rng, level="full"):
    """OCR and Grounding: the box of the shape that carries a given letter."""
    colors = ("yellow", "orange", "green", "red")  # on which black can be read
    image, objects = scene(rng, int(rng.integers(2, 4)), colors, ("square", "circle"))
    names, draw = letters(rng, len(objects)), ImageDraw.Draw(image)
    for item, name in zip(objects, names, strict=True):
        draw.text(item.center, name, (0, 0, 0), font(9, 1), anchor="mm")
    index = int(rng.integers(len(objects)))
    return image, [(f"find the letter {names[index]}", locations(objects[index].box), "box")]


def side_color(rng, level="full"):
    """Grounding and VQA: colour or shape of the leftmost, rightmost, highest or lowest shape."""
    side, found = choice(rng, list(SIDES)), None
    while found is None:
        image, objects = scene(rng, int(rng.integers(3, 6)))
        found = outermost(objects, side)
    if rng.random() < 0.5:
        return image, [(f"what color is the {side} shape ?", found.color, "color")]
    return image, [(f"what shape is {side} ?", found.shape, "shape")]


COMBINED = {
    "Chart+OCR": labelled_bars,
    "OCR+Grounding": labelled_shapes,
    "Grounding+VQA": side_color,
}
