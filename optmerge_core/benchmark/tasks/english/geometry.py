"""Figures with labelled lengths and angles (Geometry).

What is computed from a figure's labels is a fact, by the figure and its numbers; a quarter of the
facts is kept from training. Level `easy` has small numbers, `medium` asks to read and to name
rather than to compute.
"""

from PIL import Image, ImageDraw

from optmerge_core.benchmark.tasks.english.drawing import (
    CELL,
    CELLS,
    IMAGE_SIZE,
    Drawing,
    Turn,
    covered,
    reserved,
)
from optmerge_core.benchmark.tasks.english.figures import FIGURES, SIDES, UNKNOWN, integer
from optmerge_core.benchmark.tasks.english.lettering import allowed, font
from optmerge_core.benchmark.tasks.scenes import choice, converse

FINE = 3  # lines are drawn this much larger first, for smooth edges
FACES = ("sans", "bold", "serif", "stix bold", "modern sans", "typewriter")
INKS = ((25, 25, 25), (30, 50, 140), (150, 30, 40), (20, 100, 60), (110, 50, 130), (150, 80, 20))
ASK = {
    "caption": (
        "Describe the figure.",
        "What is drawn here?",
        "Describe everything in the figure.",
    ),
    "shape": ("What shape is this?", "Which shape is drawn?", "What is this figure called?"),
    "sides": (
        "How many sides does the shape have?",
        "Count the sides of the figure.",
        "How many sides are there?",
    ),
    "read": (
        "What number is written {where}?",
        "Which number is {where}?",
        "Read the number {where}.",
    ),
    "perimeter": (
        "What is the perimeter of the {shape}?",
        "Find the perimeter.",
        "How long is the way around the {shape}?",
    ),
    "area": (
        "What is the area of the {shape}?",
        "Find the area.",
        "How large is the area of the {shape}?",
    ),
    "diameter": ("What is the diameter?", "Find the diameter of the circle.", "How wide is it?"),
    "radius": (
        "What is the radius?",
        "Find the radius of the circle.",
        "How far is the center from the edge?",
    ),
    "angle": (
        "What is the missing angle?",
        "How many degrees is the angle x?",
        "Find the angle marked x.",
    ),
    "parallel": (
        "The two lines are parallel. What is the angle x?",
        "Two lines are parallel. How many degrees is x?",
        "Find the angle x between the line and the parallel one.",
    ),
    "length": (
        "How long is the side marked x?",
        "How long is the missing side?",
        "Find the length of x.",
    ),
}
READ = {"shape": 2.0, "sides": 2.0, "read": 4.0}
COMPUTE = dict.fromkeys(
    ("perimeter", "area", "diameter", "radius", "angle", "parallel", "length"), 3.0
)
WEIGHTS = {
    "easy": READ | dict.fromkeys(COMPUTE, 2.0),
    "medium": READ | {"perimeter": 1.0, "diameter": 1.0, "angle": 1.0},
    "full": {"shape": 0.3, "sides": 0.3, "read": 0.7} | COMPUTE,
}


def paper(rng):
    """Plain, tinted or squared paper, drawn FINE times larger."""
    shade = tuple(int(v) for v in rng.integers(232, 256, 3))
    image = Image.new("RGB", (FINE * IMAGE_SIZE, FINE * IMAGE_SIZE), shade)
    draw = ImageDraw.Draw(image)
    if rng.random() < 0.3:
        step, faint = FINE * integer(rng, 9, 16), tuple(v - 22 for v in shade)
        for at in range(step // 2, FINE * IMAGE_SIZE, step):
            draw.line((at, 0, at, FINE * IMAGE_SIZE), faint, FINE)
            draw.line((0, at, FINE * IMAGE_SIZE, at), faint, FINE)
    return image, draw


def sketch(rng, figure):
    """The picture of a figure, a little shifted, and its cells."""
    image, draw = paper(rng)
    ink, dark = choice(rng, INKS), choice(rng, INKS)
    fill = tuple(int(v) for v in rng.integers(205, 256, 3)) if rng.random() < 0.4 else None
    shift, width = rng.uniform(-3, 3, 2), FINE * choice(rng, (1, 2, 2))

    def moved(point, scale=1):
        return tuple(scale * float(v + d) for v, d in zip(point, shift, strict=True))

    cells = {}
    if figure.circle:
        x, y = moved(figure.circle[:2], FINE)
        size = FINE * figure.circle[2]
        draw.ellipse((x - size, y - size, x + size, y + size), fill, ink, width)
    for points, closed in figure.lines:
        path = [moved(p, FINE) for p in points]
        if closed:
            draw.polygon(path, fill)
            path += path[:2]
        draw.line(path, ink, width, joint="curve")
    image = image.reduce(FINE)
    draw, face, height = ImageDraw.Draw(image), choice(rng, FACES), integer(rng, 10, 11)
    for text, place, _ in figure.labels:
        x, y = moved(place)
        letters = font(face, height)
        if face in ("modern sans", "typewriter"):
            text = text.rstrip("°")  # which these fonts lack
        draw.text((x, y), text, dark, letters, anchor="mm")
        half = letters.getlength(text) / 2
        box = (x - half, y - height / 2, x + half, y + height / 2)
        for cell in {(int(y // CELL), int(x // CELL)): 0} | dict.fromkeys(covered(box, 0.3)):
            name(cells, cell, text.rstrip("°"))
    outline(figure, moved, cells)
    return image, {cell: names[:3] for cell, names in cells.items()}


def name(cells, cell, word):
    if all(0 <= v < CELLS for v in cell) and word not in cells.setdefault(cell, []):
        cells[cell].append(word)


def outline(figure, moved, cells):
    """Name what is drawn in `cells`: the figure in its middle, its corners, its lines."""
    points = [p for line, _ in figure.lines for p in line]
    closed = [line for line, closes in figure.lines if closes]
    if figure.circle or closed:
        points = closed[0] if closed else [figure.circle[:2]]
        x, y = (sum(v) / len(points) for v in zip(*points, strict=True))
        name(cells, tuple(int(v // CELL) for v in moved((x, y))[::-1]), figure.name)
    for line, closes in figure.lines:
        for corner in line if closes else line[1:-1]:
            name(cells, tuple(int(v // CELL) for v in moved(corner)[::-1]), "corner")
        for start, end in zip(line, [*line[1:], line[0]] if closes else line[1:], strict=False):
            for share in range(1, 12):
                between = [a + (b - a) * share / 12 for a, b in zip(start, end, strict=True)]
                name(cells, tuple(int(v // CELL) for v in moved(between)[::-1]), "line")


def questions(rng, figure, held):
    """All turns about a figure; what is computed from reserved numbers is held out."""

    def ask(kind, answer, **fields):
        question = choice(rng, ASK[kind]).format(**fields)
        return Turn(question, str(answer), kind, held_out=held and kind in COMPUTE)

    if figure.name in SIDES or figure.circle:
        yield ask("shape", figure.name)
    if figure.name in SIDES:
        yield ask("sides", SIDES[figure.name])
    for text, _, where in figure.labels:
        if text != UNKNOWN:
            yield ask("read", text.rstrip("°"), where=where)
    for kind, value in figure.results.items():
        yield ask(kind, value, shape=figure.name)


def geometry(rng, split, level):
    small = level == "easy"
    figure = allowed(rng, split, lambda: choice(rng, FIGURES)(rng, small), "geometry")
    held = reserved("geometry", figure)
    image, cells = sketch(rng, figure)
    if level == "caption":
        return Drawing(image, [Turn(choice(rng, ASK[level]), figure.told, level)], cells)
    return Drawing(image, converse(rng, list(questions(rng, figure, held)), WEIGHTS[level]), cells)
