"""Pictures that can be told in words: all that is asked of one follows from what is written of it.

What the study `smol_omni` asks about. A scene's things stand in ninths of their own, and the
written description names each thing and its ninth; a text's says what is written on which line. So
one question goes with the picture or with its description, and a language model that has read
descriptions alone knows what to do with either.
"""

from dataclasses import dataclass

import numpy as np

from optmerge_core.benchmark.tasks.english.asking import (
    Asker,
    ask_colors,
    ask_counts,
    ask_facts,
    ask_names,
    ask_yes_no,
)
from optmerge_core.benchmark.tasks.english.cast import draw_cast
from optmerge_core.benchmark.tasks.english.scenes import VQA_THEMES, weighted
from optmerge_core.benchmark.tasks.english.stage import stage
from optmerge_core.benchmark.tasks.english.surfaces import draw_text
from optmerge_core.benchmark.tasks.english.things import confused, kept_place, things
from optmerge_core.benchmark.tasks.english.writing import ORDINALS, questions, some_text
from optmerge_core.benchmark.tasks.samples import SPLITS, image_hash
from optmerge_core.benchmark.tasks.scenes import choice, converse

THINGS = (2, 5)  # in a scene, least and most
SCENE = {"name": 2, "place": 1, "color": 3, "count": 2, "exists": 1, "relation": 1.5}
SCENE |= {"which": 1.5, "use": 0.5, "named": 1.5}
TEXT = dict.fromkeys(("word", "line", "thing", "month", "year", "weekday", "time", "number"), 1.0)
TEXT |= {"read": 4, "price": 2, "date": 2, "name": 2}
"""Kind of question -> how often it is asked. Letters are not counted and named: it is not told how
a tokenizer cuts a word."""
THEMES = {t: entry for t, entry in VQA_THEMES.items() if t not in ("animals", "legs")}
NAMED = (
    "Is what the voice names in the picture?",
    "The voice names a thing. Does the picture show it?",
    "Do you see what the voice says?",
)
"""Ways to ask in writing about a picture and a voice that says `a dog`."""
START = ("Picture", "You see", "The picture shows")


@dataclass(frozen=True)
class Asked:
    """What is heard, what stands in writing after it, the answer and the kind of question.

    heard may be written too, in the same place. held_out: as in `Turn`.
    """

    heard: str
    answer: str
    kind: str
    held_out: bool = False
    written: str = ""


@dataclass(frozen=True)
class Shown:
    """A picture, uint8 (112, 112, 3), the same in words, and what is asked about it."""

    image: np.ndarray
    told: str
    asked: list[Asked]


def place_of(item):
    return f"in the {item.region}" if item.region == "middle" else f"at the {item.region}"


def of_item(item):
    """A thing with its colour, or the one it stands on: "yellow lemon", "dog on a red circle"."""
    if item.ground:
        return f"{item.name} on a {' '.join(item.ground)}"
    return f"{item.color} {item.name}".strip()


def tell_scene(rng, items):
    """All things and their ninths, in an order of chance, in one of three ways to say it."""
    parts = [(of_item(items[i]), items[i]) for i in rng.permutation(len(items))]
    ways = (
        lambda: "; ".join(f"{item.region}: {what}" for what, item in parts),
        lambda: ", ".join(f"{what} {place_of(item)}" for what, item in parts),
        lambda: ", ".join(f"{place_of(item)} {_a(what)}" for what, item in parts),
    )
    said = choice(rng, ways)()
    return f"{choice(rng, START)}: {said}."


def _a(what):
    return f"{'an' if what[0] in 'aeiou' else 'a'} {what}"


def name_aloud(rng, items, split):
    """A thing that a voice names: one that is there, one that is not."""
    item, here = choice(rng, items), {i.name for i in items}
    absent = [t for n, t in things().items() if n not in here and not confused(n, here)]
    held_out = kept_place(item.name, item.region)
    if split == "test" or not held_out:
        yield Asked(item.thing.a, "yes", "named", held_out, choice(rng, NAMED))
    yield Asked(choice(rng, absent).a, "no", "named", False, choice(rng, NAMED))


def scene(rng, split):
    """(picture, description, what is asked) of things in ninths; nothing that words alone tell."""
    theme = weighted(rng, {name: weight for name, (weight, _) in THEMES.items()})
    count = int(rng.integers(THINGS[0], THINGS[1] + 1))
    drawn = stage(rng, draw_cast(rng, split, count, theme), split, ninths=True)
    asker = Asker(rng, drawn, split)
    for ask in (ask_names, ask_colors, ask_counts, ask_yes_no, ask_facts):
        ask(asker)
    turns = [Asked(t.question, t.answer, t.kind, t.held_out) for t in asker.turns if not t.blind]
    turns += name_aloud(rng, drawn.items, split)
    often = {kind: w * (3 if kind in THEMES[theme][1] else 1) for kind, w in SCENE.items()}
    return drawn.image, tell_scene(rng, drawn.items), chosen(rng, turns, often)


def text(rng, split):
    """(picture, description, what is asked) of one or two lines that are written large."""
    written = some_text(rng, split, "easy")
    turns = [Asked(t.question, t.answer, t.kind, t.held_out) for t in questions(rng, written)]
    image, _, _ = draw_text(rng, written, "easy")
    told = f"{choice(rng, START)}: {_a(written.surface)} that says: {tell_lines(written.lines)}."
    return image, told, chosen(rng, turns, TEXT)


def tell_lines(lines):
    if len(lines) == 1:
        return lines[0]
    return "; ".join(f"{nth} line: {line}" for nth, line in zip(ORDINALS, lines, strict=False))


def chosen(rng, turns, weights):
    """Up to four of the turns, of kinds by their weights; see `converse`."""
    numbered = [(number, None, turn.kind) for number, turn in enumerate(turns)]
    return [turns[number] for number, *_ in converse(rng, numbered, weights)]


DRAW = {"scene": scene, "text": text}


def shown(what, split, index, seed=0):
    """Picture number `index` of a split: of a `scene` or a `text`; everywhere the same.

    As in `samples.sample`, the hash of the pixels says to which split a picture may belong.
    """
    stream = 300 + list(DRAW).index(what)
    rng = np.random.default_rng([seed, list(SPLITS).index(split), stream, index])
    while True:
        image, told, asked = DRAW[what](rng, split)
        pixels = np.asarray(image)
        if asked and int(image_hash(pixels), 16) % 10 in SPLITS[split]:
            return Shown(pixels, told, asked)
