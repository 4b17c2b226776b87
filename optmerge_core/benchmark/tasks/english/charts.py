"""Charts with words on their axes: bars that stand or lie, lines, pies (Chart).

A word with its value is a fact; a quarter of the facts is never drawn in training. Level `easy`
shows two or three values, `medium` asks for values and extremes only; `full`, what experts learn
and tests ask, asks about the chart itself too.
"""

from dataclasses import dataclass

import numpy as np
from matplotlib import rc_context
from matplotlib.patches import Wedge

from optmerge_core.benchmark.tasks.english.drawing import IMAGE_SIZE, Turn, reserved
from optmerge_core.benchmark.tasks.english.easel import COLORS, STYLE, Easel
from optmerge_core.benchmark.tasks.english.lettering import words
from optmerge_core.benchmark.tasks.scenes import choice, converse

GROUPS = ("fruits", "animals", "cities", "sports", "food", "transport", "people", "plants")
SCALES = {10: (2, 1), 50: (10, 5), 100: (20, 10)}  # top of the axis -> (tick, unit of the values)
ASK = {
    "caption": ("Describe the chart.", "What does the chart show?", "Read out the whole chart."),
    "value": ("What is the value of {a}?", "How many for {a}?", "What is the number for {a}?"),
    "percent": (
        "What percent is {a}?",
        "What is the share of {a}?",
        "What percentage does {a} have?",
    ),
    "highest": (
        "Which {thing} is the {highest}?",
        "Which one has the largest value?",
        "Which is the {highest}?",
    ),
    "lowest": (
        "Which {thing} is the {lowest}?",
        "Which one has the smallest value?",
        "Which is the {lowest}?",
    ),
    "above": (
        "How many {thing}s are above {x}?",
        "How many values are larger than {x}?",
        "Count the {thing}s above {x}.",
    ),
    "difference": (
        "What is the difference between {a} and {b}?",
        "How much more is {a} than {b}?",
        "By how much is {a} larger than {b}?",
    ),
    "sum": (
        "What is the sum of {a} and {b}?",
        "How many are {a} and {b} together?",
        "What do {a} and {b} add up to?",
    ),
    "compare": (
        "Is {a} larger than {b}?",
        "Is the value of {a} higher than that of {b}?",
        "Does {a} have more than {b}?",
    ),
    "count": (
        "How many {thing}s are there?",
        "How many {thing}s does the chart have?",
        "Count the {thing}s.",
    ),
    "kind": (
        "What kind of chart is it?",
        "Is it a bar chart, a horizontal bar chart, a line chart or a pie chart?",
        "Which kind of chart is this?",
    ),
    "printed": (
        "Are the values written in the chart?",
        "Is every value written down?",
        "Does the chart print its values?",
    ),
    "color": (
        "What color is the {thing} for {a}?",
        "Which color does the {thing} for {a} have?",
        "What is the color of the {thing} for {a}?",
    ),
}
READ = {"value": 4.0, "percent": 4.0, "highest": 1.5, "lowest": 1.5}
MORE = "above", "difference", "sum", "compare", "count", "color"
FULL = {"above": 1.5, "difference": 0.3, "sum": 0.2, "compare": 2.0, "count": 1.0, "color": 1.5}
ABOUT = {"kind": 1.0, "printed": 0.7}
WEIGHTS = {
    "easy": READ | dict.fromkeys(MORE, 1.0),
    "medium": READ,
    "full": READ | {"highest": 2.5, "lowest": 2.5} | FULL | ABOUT,
}


@dataclass(frozen=True)
class Data:
    """What a chart shows: names, their values and colours, the top of the axis.

    printed: whether each value is written at its bar, point or slice; if not, an axis tells it.
    """

    names: list[str]
    values: list[int]
    colors: list[str]
    top: int
    printed: bool

    def __iter__(self):
        return zip(self.names, self.values, self.colors, strict=True)

    def ticks(self):
        return () if self.printed else range(0, self.top + 1, SCALES[self.top][0])


# ---------------------------------------------------------------- kinds of chart


def axes(rng, data, easel, left, bottom, height):
    """The line below, and with values to be read off it the scale on the left."""
    right = IMAGE_SIZE - 2 if rng.random() < 0.7 else left
    for tick in data.ticks():
        y = bottom + height * tick / data.top
        easel.line((left - 2, right), (y, y), (0.72, 0.72, 0.72), 0.8)
        easel.text(left - 4, y, tick, "right")
    if rng.random() < 0.7:
        easel.line((left, left), (bottom, bottom + height + 3))
    easel.line((left, IMAGE_SIZE - 2), (bottom, bottom))


def standing(rng, data, easel):
    left, bottom, height = (4, 18, 78) if data.printed else (24, 18, 86)
    axes(rng, data, easel, left, bottom, height)
    pitch = (IMAGE_SIZE - 2 - left) / len(data.names)
    half = pitch * rng.uniform(0.28, 0.42)
    for i, (name, value, color) in enumerate(data):
        x, end = left + pitch * (i + 0.5), bottom + height * value / data.top
        easel.bar((x - half, bottom, x + half, end), color, "bar")
        easel.show((x - half, end - 6, x + half, end + 2), str(value), first=True)
        easel.text(x, bottom - 9, name)
        if data.printed:
            easel.text(x, end + 7, value)


def lying(rng, data, easel):
    left, bottom = 7 + max(easel.width(name) for name in data.names), 4 if data.printed else 18
    length = IMAGE_SIZE - left - (20 if data.printed else 8)
    pitch = (IMAGE_SIZE - 3 - bottom) / len(data.names)
    half = pitch * rng.uniform(0.26, 0.4)
    for tick in data.ticks():
        x = left + length * tick / data.top
        easel.line((x, x), (bottom - 2, IMAGE_SIZE - 3), (0.72, 0.72, 0.72), 0.8)
        if tick % (2 * SCALES[data.top][0]) == 0:
            easel.text(x, bottom - 9, tick)
    for i, (name, value, color) in enumerate(data):
        y, end = IMAGE_SIZE - 3 - pitch * (i + 0.5), left + length * value / data.top
        easel.bar((left, y - half, end, y + half), color, "bar")
        easel.show((end - 6, y - half, end + 2, y + half), str(value), first=True)
        easel.text(left - 3, y, name, "right")
        if data.printed:
            easel.text(end + 3, y, value, "left")
    easel.line((left, left), (bottom, IMAGE_SIZE - 3))


def points(rng, data, easel):
    left, bottom, height = (4, 18, 76) if data.printed else (24, 18, 84)
    axes(rng, data, easel, left, bottom, height)
    pitch = (IMAGE_SIZE - 2 - left) / len(data.names)
    xs = [left + pitch * (i + 0.5) for i in range(len(data.names))]
    ys = [bottom + height * value / data.top for value in data.values]
    mark, size = choice(rng, ("o", "s", "^", "D")), rng.uniform(4, 6)
    color = data.colors[0]
    easel.line(xs, ys, COLORS[color], rng.uniform(1, 2), marker=mark, markersize=size)
    for x, y, name, value in zip(xs, ys, data.names, data.values, strict=True):
        easel.show((x - 4, y - 4, x + 4, y + 4), str(value), color, "point")
        easel.text(x, bottom - 9, name)
        if data.printed:
            easel.text(x, y + 9, value)
    for at in np.linspace(xs[0], xs[-1], 20):
        y = float(np.interp(at, xs, ys))
        easel.show((at, y, at, y), "line")


def pie(rng, data, easel):
    """Slices with their percentages in them, and below what their colours mean."""
    x, y, radius = IMAGE_SIZE / 2, IMAGE_SIZE - 40, 37
    hole, edge, turn = choice(rng, (0, 0, 0.35)), choice(rng, ("white", "black")), 90.0
    for i, (name, value, color) in enumerate(data):
        extent = 3.6 * value
        look = {"facecolor": COLORS[color], "edgecolor": edge, "linewidth": 1}
        width = radius * (1 - hole)
        easel.add(Wedge((x, y), radius, turn - extent, turn, width=width, **look))
        middle = np.radians(turn - extent / 2)
        across, up = (float(0.68 * radius * f(middle)) for f in (np.cos, np.sin))
        spot = (x + across, y + up)
        easel.show((spot[0] - 9, spot[1] - 9, spot[0] + 9, spot[1] + 9), color, "slice")
        if data.printed:
            easel.text(*spot, f"{value}%", ink="white" if sum(COLORS[color]) < 1.6 else "black")
        turn -= extent
        left, bottom = 4 + 54 * (i % 2), 18 - 14 * (i // 2)
        easel.bar((left, bottom, left + 8, bottom + 8), color, "color")
        easel.text(left + 11, bottom + 4, name, "left")


KINDS = {
    "bar chart": standing,
    "horizontal bar chart": lying,
    "line chart": points,
    "pie chart": pie,
}
THINGS = {
    "bar chart": "bar",
    "horizontal bar chart": "bar",
    "line chart": "point",
    "pie chart": "slice",
}

# ---------------------------------------------------------------- what it shows


def some_names(rng, kind, count, printed, easel):
    """Different names of one group that fit where they are written; a line's follow in time.

    There are `count` of them, or fewer where they would touch each other.
    """
    room = {"horizontal bar chart": 46, "pie chart": 42}.get(kind)
    room = room or (106 if printed else 86) / count - 3
    if kind == "line chart" or (kind == "bar chart" and rng.random() < 0.4):
        group = [word[:3] for word in words(choice(rng, ("months", "days")))]
        first = int(rng.integers(len(group) - count + 1))
        names = group[first : first + count]
        return names if max(map(easel.width, names)) <= room else names[:-1]
    fitting = [[w for w in words(group) if easel.width(w) <= room] for group in GROUPS]
    fitting = [group for group in fitting if len(group) >= count]
    if not fitting:
        return some_names(rng, kind, count - 1, printed, easel)
    group = choice(rng, fitting)
    return [group[i] for i in rng.permutation(len(group))[:count]]


def some_values(rng, kind, count, top, printed):
    """Different values, so that there is one highest and one lowest."""
    if kind == "pie chart":  # shares of 5 %, none under 10 %
        while True:
            cuts = np.sort(rng.permutation(19)[: count - 1] + 1) * 5
            shares = np.diff(np.concatenate([[0], cuts, [100]]))
            if shares.min() >= 10 and len(set(shares.tolist())) == count:
                return shares.tolist()
    unit = 1 if printed else SCALES[top][1]
    values = np.arange(max(unit, top // 10), top + 1, unit)
    return values[rng.permutation(len(values))[:count]].tolist()


def some_data(rng, split, level, kind, easel):
    """Data that the split may show: training and validation get no reserved fact."""
    most = {"horizontal bar chart": 5}.get(kind, 4)
    low, high = {"easy": (2, 3), "caption": (2, 4)}.get(level, (3, most))
    while True:
        count = int(rng.integers(low, high + 1))
        top = 100 if kind == "pie chart" else choice(rng, tuple(SCALES))
        often = 0.7 if level == "full" else 0.5
        printed = rng.random() < often or (kind == "pie chart" and level != "full")
        names = some_names(rng, kind, count, printed, easel)
        values = some_values(rng, kind, len(names), top, printed)
        if split == "test" or not any(map(held, names, values)):
            break
    colors = [list(COLORS)[i] for i in rng.permutation(len(COLORS))[: len(names)]]
    if kind == "line chart" or (kind != "pie chart" and rng.random() < 0.4):
        colors = colors[:1] * len(names)
    return Data(names, values, colors, top, printed)


def held(name, value):
    """Whether a name with its value is kept from training."""
    return reserved("chart", name, value)


def questions(rng, data, kind):
    """All turns about a chart; held out are those for which a reserved fact must be read."""
    facts = dict(zip(data.names, data.values, strict=True))
    percent, thing = kind == "pie chart", THINGS[kind]
    fields = {"thing": thing, "highest": "highest", "lowest": "lowest"}
    if percent:
        fields |= {"highest": "largest", "lowest": "smallest"}

    def ask(kind, answer, about=(), **more):
        question = choice(rng, ASK[kind]).format(**fields, **more)
        return Turn(question, str(answer), kind, held_out=any(held(n, facts[n]) for n in about))

    for extreme, of in (("highest", max), ("lowest", min)):
        name = of(data.names, key=facts.get)
        yield ask(extreme, name, [name])
    yield ask("count", len(facts))
    for name, _, color in data if len(set(data.colors)) > 1 else ():
        yield ask("color", color, a=name)
    for a in data.names:
        for b in data.names:
            if a != b:
                yield ask("compare", "yes" if facts[a] > facts[b] else "no", [a, b], a=a, b=b)
    if percent and not data.printed:
        return  # nothing tells its numbers
    for a in data.names:
        yield ask("percent" if percent else "value", facts[a], [a], a=a)
        for b in data.names:
            if facts[a] > facts[b]:
                yield ask("difference", facts[a] - facts[b], [a, b], a=a, b=b)
                yield ask("sum", facts[a] + facts[b], [a, b], a=a, b=b)
    for x in range(data.top // 5, data.top, data.top // 5):
        if x not in data.values:
            yield ask("above", sum(v > x for v in data.values), data.names, x=x)


def chart(rng, split, level):
    kind = choice(rng, ("bar chart", *KINDS))
    with rc_context(STYLE):
        easel = Easel(rng)
        data = some_data(rng, split, level, kind, easel)
        KINDS[kind](rng, data, easel)
    turns = list(questions(rng, data, kind))
    if level == "full":
        for about, answer in (("kind", kind), ("printed", "yes" if data.printed else "no")):
            turns.append(Turn(choice(rng, ASK[about]), answer, about))
    turns = converse(rng, turns, WEIGHTS.get(level, {}))
    if level == "caption":
        told = f"a {kind}: " + ", ".join(f"{name} {value}" for name, value, _ in data)
        new = any(map(held, data.names, data.values))
        turns = [Turn(choice(rng, ASK[level]), told, level, held_out=new)]
    return easel.drawing(turns)
