"""The figures of geometry: what they look like, what is written on them, what follows from it.

A figure is drawn to scale as far as its labels leave room. Each maker takes a random generator and
whether its numbers shall be small.
"""

import math
from dataclasses import dataclass

from optmerge_core.benchmark.tasks.english.drawing import IMAGE_SIZE
from optmerge_core.benchmark.tasks.scenes import choice

SIDES = {"triangle": 3, "square": 4, "rectangle": 4, "pentagon": 5, "hexagon": 6, "octagon": 8}
TRIPLES = ((3, 4, 5), (6, 8, 10), (5, 12, 13), (9, 12, 15), (8, 15, 17), (12, 16, 20))
UNKNOWN = "x"
PLACES = (
    "on the left",
    "on the right",
    "at the bottom",
)  # a triangle's sides, from its left corner
IN_IT = "in the figure"


@dataclass
class Figure:
    """What is drawn and what is known about it.

    given: its numbers. results: kind of question -> the number computed from them. lines: [(points,
    whether they close)] in pixels; labels: [(text, (x, y), where it is written, in words)].
    """

    name: str
    given: list[int]
    results: dict[str, int]
    lines: list[tuple[list, bool]]
    labels: list[tuple[str, tuple, str]]
    circle: tuple | None = None

    def __str__(self):
        """The fact that is asked for, whatever the order of its numbers."""
        return " ".join(map(str, [self.name, *sorted(self.given), *self.results.items()]))

    @property
    def told(self):
        """The figure and its labels: 'a rectangle, 7 at the top, 4 on the left'."""
        article = "" if self.name.startswith("two") else "an " if self.name[0] == "o" else "a "
        labels = (f"{text} {where}" for text, _, where in self.labels)
        return ", ".join([article + self.name, *labels])


def integer(rng, low, high, step=1):
    """A multiple of `step` from low to high, both included."""
    return step * int(rng.integers(low // step, high // step + 1))


def outside(start, end, distance=12):
    """The point outside the middle of a side, where the sides go round as a clock does."""
    across, down = end[0] - start[0], end[1] - start[1]
    share = distance / math.hypot(across, down)
    return (start[0] + end[0]) / 2 + share * down, (start[1] + end[1]) / 2 - share * across


def towards(point, degrees, length):
    """The point in a direction: 0 is right, 90 down."""
    turn = math.radians(degrees)
    return point[0] + length * math.cos(turn), point[1] + length * math.sin(turn)


def within(corner, first, second, room=14):
    """Where the label of an angle between two directions fits: the narrower the farther."""
    distance = room / math.sin(math.radians(second - first) / 2)
    return towards(corner, (first + second) / 2, min(max(distance, 19), 48))


# ---------------------------------------------------------------- lengths


def rectangle(rng, small):
    a, b = (integer(rng, 2, 5 if small else 12) for _ in range(2))
    b = a if rng.random() < 0.35 else b
    name = "square" if a == b else "rectangle"
    wide, high = (62, 62) if a == b else (integer(rng, 62, 70), integer(rng, 38, 54))
    if a < b:
        wide, high = high, wide
    left, top = (IMAGE_SIZE - wide) / 2, (IMAGE_SIZE - high) / 2
    right, bottom = left + wide, top + high
    corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
    sides = list(zip(corners, [*corners[1:], corners[0]], strict=True))
    places = ("at the top", "on the right", "at the bottom", "on the left")
    shown = [(a, choice(rng, (0, 2))), (b, choice(rng, (1, 3)))][: 1 if a == b else 2]
    labels = [(str(n), outside(*sides[i]), places[i]) for n, i in shown]
    return Figure(
        name, [a, b], {"perimeter": 2 * (a + b), "area": a * b}, [(corners, True)], labels
    )


def three_sides(rng, small):
    """A triangle with all its sides written, not to scale."""
    most = 6 if small else 12
    a, b = (integer(rng, 3, most) for _ in range(2))
    c = integer(rng, max(2, abs(a - b) + 1), min(a + b - 1, most))
    corners = [(16, 90), (56 + integer(rng, -14, 14), 22), (96, 90)]
    sides = zip((a, b, c), corners, [*corners[1:], corners[0]], PLACES, strict=True)
    labels = [(str(n), outside(start, end), place) for n, start, end, place in sides]
    return Figure("triangle", [a, b, c], {"perimeter": a + b + c}, [(corners, True)], labels)


def right_triangle(rng, small):
    """Two sides of three: the legs for the area, any two for the third, marked x."""
    corners = [(24, 90), (24, 22), (98, 90)]
    lines = [(corners, True), ([(24, 81), (33, 81), (33, 90)], False)]
    if rng.random() < 0.4:
        up, along = integer(rng, 2, 6 if small else 12), integer(rng, 2, 6 if small else 14, 2)
        given, results, shown = [up, along], {"area": up * along // 2}, (str(up), "", str(along))
    else:
        up, along, slope = choice(rng, TRIPLES[:2] if small else TRIPLES)
        numbers = (up, slope, along) if rng.random() < 0.5 else (along, slope, up)
        asked = 1 if small or rng.random() < 0.5 else choice(rng, (0, 2))
        given = [n for i, n in enumerate(numbers) if i != asked]
        results = {"length": numbers[asked]}
        shown = [UNKNOWN if i == asked else str(n) for i, n in enumerate(numbers)]
    sides = zip(shown, corners, [*corners[1:], corners[0]], PLACES, strict=True)
    labels = [(text, outside(start, end), place) for text, start, end, place in sides if text]
    return Figure("triangle", given, results, lines, labels)


def polygon(rng, small):
    """A pentagon, hexagon or octagon with equal sides, one of them written."""
    name, side = choice(rng, ("pentagon", "hexagon", "octagon")), integer(rng, 2, 4 if small else 9)
    count = SIDES[name]
    first = 90 + 180 / count + rng.uniform(-5, 5)
    corners = [towards((56, 50), first + 360 * i / count, 38) for i in range(count)]
    label = (str(side), outside(corners[-1], corners[0]), "at the bottom")
    return Figure(name, [side], {"perimeter": count * side}, [(corners, True)], [label])


def circle(rng, small):
    radius = integer(rng, 2, 6 if small else 25)
    turn, size = rng.uniform(-40, 40), integer(rng, 36, 44)
    middle = (56, 56)
    ends = [middle, towards(middle, turn, size)]
    given, results, where = radius, {"diameter": 2 * radius}, "on the radius"
    if rng.random() < 0.5:
        ends[0] = towards(middle, turn, -size)
        given, results, where = 2 * radius, {"radius": radius}, "on the diameter"
    label = (str(given), outside(*ends, 10), where)
    return Figure("circle", [given], results, [(ends, False)], [label], circle=(*middle, size))


# ---------------------------------------------------------------- angles


def three_angles(rng, small):
    """A triangle with two of its angles written."""
    a = b = 0
    while not 100 <= a + b <= 140:  # for a corner at the top that its label fits into
        a, b = (integer(rng, 40 if small else 35, 70, 10 if small else 5) for _ in range(2))
    rise, fall = math.tan(math.radians(a)), math.tan(math.radians(b))
    base = min(92, 78 * (1 / rise + 1 / fall))
    top = base / (1 / rise + 1 / fall)
    left, right = ((IMAGE_SIZE - base) / 2, 95), ((IMAGE_SIZE + base) / 2, 95)
    apex = (left[0] + top / rise, 95 - top)
    spots = (within(left, -a, 0, 11), within(apex, b, 180 - a), within(right, 180, 180 + b, 11))
    places = ("at the left corner", "at the top corner", "at the right corner")
    values, asked = (a, 180 - a - b, b), int(rng.integers(3))
    labels = [(UNKNOWN if i == asked else f"{values[i]}°", spots[i], places[i]) for i in range(3)]
    given = [value for i, value in enumerate(values) if i != asked]
    lines = [([left, apex, right], True)]
    return Figure("triangle", given, {"angle": values[asked]}, lines, labels)


def split(rng, small):
    """A straight or a right angle in two parts, one of them written."""
    whole = choice(rng, (90, 180))
    step = 10 if small else 5
    part = integer(rng, 30, 60, step) if whole == 90 else integer(rng, 40, 140, step)
    corner = (18, 92) if whole == 90 else (56, 82)
    legs = [towards(corner, -turn, 78 if whole == 90 else 50) for turn in (0, part, whole)]
    lines = [([legs[0], corner, legs[2]], False), ([corner, legs[1]], False)]
    if whole == 90:
        x, y = corner
        lines.append(([(x, y - 9), (x + 9, y - 9), (x + 9, y)], False))
    spots = [within(corner, -part, 0), within(corner, -whole, -part)]
    known = int(rng.integers(2))
    value = whole - part if known else part
    labels = [(f"{value}°", spots[known], IN_IT), (UNKNOWN, spots[1 - known], "in the other part")]
    name = "right angle in two parts" if whole == 90 else "straight line and a ray"
    return Figure(name, [value], {"angle": whole - value}, lines, labels)


def crossing(rng, small):
    """Two lines that cross, or two parallels and a line across: one angle is written."""
    angle = integer(rng, 50, 130, 10 if small else 5)
    parallel = rng.random() < 0.5
    if parallel:
        tilt, apart = 0, 23 / math.tan(math.radians(angle))
        points = [(56 + apart, 33), (56 - apart, 79)]
    else:
        tilt, points = rng.uniform(-15, 15), [(56, 56), (56, 56)]
    across = [towards(points[0], tilt - angle, 90), towards(points[1], tilt - angle, -90)]
    rails = [[towards(p, tilt, -90), towards(p, tilt, 90)] for p in points[: 1 + parallel]]
    lines = [(line, False) for line in (*rails, across)]
    turns = [tilt - angle, tilt, tilt + 180 - angle, tilt + 180, tilt + 360 - angle]
    known, asked = (int(i) for i in rng.permutation(4)[:2])
    if parallel:
        asked = int(rng.integers(4))
    sizes = (angle, 180 - angle, angle, 180 - angle)
    labels = [
        (f"{sizes[known]}°", within(points[0], *turns[known : known + 2]), IN_IT),
        (UNKNOWN, within(points[1], *turns[asked : asked + 2]), "at another angle"),
    ]
    kind, name = (
        ("parallel", "two parallel lines and a third")
        if parallel
        else ("angle", "two crossing lines")
    )
    return Figure(name, [sizes[known]], {kind: sizes[asked]}, lines, labels)


FIGURES = (rectangle, rectangle, three_sides, right_triangle, right_triangle, polygon, polygon)
FIGURES += (circle, circle, three_angles, three_angles, split, split, crossing, crossing)
