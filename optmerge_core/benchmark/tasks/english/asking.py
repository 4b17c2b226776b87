"""What can be asked about a scene and answered in a word or a number.

Every question has one answer: it is asked only where the picture leaves no doubt (what is a little
left of something is not called left of it), and facts only where nobody would argue. What is kept
for the test (a fact about a thing, a thing in a ninth of the picture) is left out of training; the
test's turns that need it are marked.
"""

from dataclasses import dataclass, field

from numpy.random import Generator

from optmerge_core.benchmark.tasks.english.cast import STEPS
from optmerge_core.benchmark.tasks.english.drawing import Turn
from optmerge_core.benchmark.tasks.english.stage import Scene
from optmerge_core.benchmark.tasks.english.things import (
    all_facts,
    confused,
    kept,
    kept_place,
    things,
)
from optmerge_core.benchmark.tasks.english.where import (
    beside,
    called,
    clear_region,
    places,
    sides,
    unlike,
)
from optmerge_core.benchmark.tasks.scenes import choice

SAID = {
    "name": ("What is {where}?", "What do you see {where}?", "Name the thing {where}."),
    "on": (
        "What is on the {ground}?",
        "What stands on the {ground}?",
        "Name what is on the {ground}.",
    ),
    "beside": ("What is {side} {x}?", "What do you see {side} {x}?", "Which thing is {side} {x}?"),
    "place": (
        "Which part of the picture shows {x}?",
        "In which part of the picture is {x}?",
        "Whereabouts in the picture is {x}?",
    ),
    "color": ("What color is {x}?", "Which color is {x}?", "Tell me the color of {x}."),
    "behind": (
        "What color is the {shape} behind {x}?",
        "{x} is on a {shape} of which color?",
        "Which color is behind {x}?",
    ),
    "count": ("How many {what} are there?", "How many {what} do you see?", "Count the {what}."),
    "exists": ("Do you see {a}?", "Is there {a} in the picture?", "Does the picture show {a}?"),
    "relation": (
        "Is {x} {side} {y}?",
        "Is it true that {x} is {side} {y}?",
        "{x} is {side} {y}: yes or no?",
    ),
    "either": (
        "Is {x} {either} {y}?",
        "Tell me: is {x} {either} {y}?",
        "{x}: {either} {y}?",
    ),
    "which": ("Which of these {that}?", "What in the picture {that}?", "Which thing here {that}?"),
    "is": ("{ask}?", "Yes or no: {ask}?", "Look: {ask}?"),
    "larger": (
        "Which animal here is the {most} in real life?",
        "In real life, which of these animals is the {most}?",
        "Name the animal that is really the {most}.",
    ),
    "larger of two": (
        "Which is {more} in real life, {x} or {y}?",
        "Really, what is {more}: {x} or {y}?",
        "Is {x} or {y} the {more} one in real life?",
    ),
    "legs": (
        "How many legs does {x} have?",
        "{x} has how many legs?",
        "Tell me how many legs {x} has.",
    ),
    "box": ("Where is {x}?", "Find {x}.", "Give the box of {x}.", "Point to {x}."),
}
"""What is asked -> ways to ask it."""


def sentence(text):
    return text[0].upper() + text[1:]


@dataclass
class Asker:
    """Collects the turns about a scene, with who may be asked them."""

    rng: Generator
    scene: Scene
    split: str
    turns: list[Turn] = field(default_factory=list)

    def ask(self, kind, answer, about=(), facts=(), also=(), blind=False, way="", **words):
        """A turn in one of the ways to say it, if training may have it.

        about: items whose place the answer shows; facts: (fact, thing's name) that the answer
        rests on, and also on that these are false. A turn is held out if it needs a place or fact
        that is kept for the test; if only one of `also` is kept, it is not asked at all.
        """
        new = any(kept(*fact) for fact in facts)
        held_out = new or any(kept_place(item.name, item.region) for item in about)
        if held_out and self.split != "test" or not new and any(kept(*fact) for fact in also):
            return
        question = sentence(choice(self.rng, SAID[way or kind]).format(**words))
        self.turns.append(Turn(question, answer, kind, blind, held_out))

    @property
    def items(self):
        return self.scene.items


# ---------------------------------------------------------------- what is said of a thing


def truth(item, fact):
    return item.thing.facts.get(fact, False)


def facts_here(items):
    """[(fact, how it is said, items it is true of)] that nobody would argue about here."""
    for fact, says in all_facts().items():
        if all(truth(item, fact) is not None for item in items):
            yield fact, says, [item for item in items if truth(item, fact)]


def needs(fact, items):
    return [(fact, item.name) for item in items]


# ---------------------------------------------------------------- questions in words


def ask_names(asker):
    items = asker.items
    for where, item in places(items):
        asker.ask("name", item.name, [item], where=where)
    for item in items:
        if item.ground and unlike(items, item, lambda i: i.ground):
            asker.ask("name", item.name, [item], way="on", ground=" ".join(item.ground))
        if x := called(items, item):
            if clear_region(item):
                asker.ask("place", item.region, [item], x=x)
            for side, other in beside(items, item):
                asker.ask("name", other.name, [other], way="beside", side=side, x=x)


def ask_colors(asker):
    """A thing's own colour, or that of what it stands on; words alone may tell a lemon's.

    What may be food, be it a point of view, is plant or animal, and has a colour of its own.
    """
    items = asker.items
    for item in items:
        if unlike(items, item, lambda i: i.name):
            x = f"the {item.name}"
            if item.ground:
                color, shape = item.ground
                asker.ask("color", color, [item], way="behind", x=x, shape=shape)
            elif item.color:
                natural = "food" in item.thing.facts and not item.thing.varies
                asker.ask("color", item.color, [item], blind=natural, x=x)
    for where, item in places(items):
        if item.color and not item.ground:
            asker.ask("color", item.color, [item], x=f"the thing {where}")


def ask_counts(asker):
    """How many of a name, of a fact, in all; what is there once or not at all is asked seldom."""
    items, counted = asker.items, []
    for plural in dict.fromkeys(item.thing.plural for item in items if item.thing.plural):
        counted.append((plural, [item for item in items if item.thing.plural == plural], (), ()))
    for fact, says, true in facts_here(items):
        if not fact.startswith("use:"):
            false = [item for item in items if item not in true]
            counted.append((says.plural, true, needs(fact, true), needs(fact, false)))
    seldom = [entry for entry in counted if len(entry[1]) < 2]
    counted = [entry for entry in counted if len(entry[1]) > 1]
    if seldom and asker.rng.random() < 0.4:
        counted.append(choice(asker.rng, seldom))
    for plural, same, facts, also in counted:
        asker.ask("count", str(len(same)), (), facts, also, what=plural)
    if len(items) > 1 and (not counted or asker.rng.random() < 0.4):
        asker.ask("count", str(len(items)), what="things")


def ask_yes_no(asker):
    """Is it there, is it left of the other: as often yes as no."""
    items = asker.items
    item = choice(asker.rng, items)
    asker.ask("exists", "yes", [item], a=item.thing.a)
    here = {i.name for i in items}
    absent = [t for n, t in things().items() if n not in here and not confused(n, here)]
    asker.ask("exists", "no", a=choice(asker.rng, absent).a)
    named = [(called(items, item), item) for item in items]
    for x, first in named:
        for y, second in named:
            if first is not second and x and y:
                ask_relation(asker, x, y, first, second)


def ask_relation(asker, x, y, first, second):
    for right, wrong in sides(first, second):
        asker.ask("relation", "yes", [first], x=x, y=y, side=right)
        asker.ask("relation", "no", [first], x=x, y=y, side=wrong)
        one, other = sorted((right, wrong), reverse=asker.rng.random() < 0.5)
        either, answer = f"{one.removesuffix(' of')} or {other}", right.removesuffix(" of")
        asker.ask("relation", answer, [first], way="either", x=x, y=y, either=either)


def ask_facts(asker):
    """What only knowledge tells of what the picture shows."""
    items = asker.items
    pointed = places(items)
    for fact, says, true in facts_here(items):
        kind = "use" if fact.startswith("use:") else "which"
        false = [item for item in items if item not in true]
        if false and len({item.name for item in true}) == 1:
            facts, also = needs(fact, true[:1]), needs(fact, false)
            asker.ask(kind, true[0].name, true[:1], facts, also, way="which", that=says.that)
        answers = {}
        for where, item in pointed:
            if asker.split == "test" or not kept(fact, item.name):
                answers.setdefault(item in true, []).append((where, item))
        if len(answers) == 2:  # one question with yes, one with no
            for value, answer in ((True, "yes"), (False, "no")):
                where, item = choice(asker.rng, answers[value])
                ask = says.ask.format(f"the thing {where}")
                asker.ask("is", answer, [item], needs(fact, [item]), ask=ask)


def ask_animals(asker):
    """How many legs an animal has, and which is larger; with their names words alone tell."""
    items = asker.items
    for where, item in places(items):
        if item.thing.legs is not None:
            legs = str(item.thing.legs)
            asker.ask("legs", legs, [item], needs("legs", [item]), x=f"the thing {where}")
    seen = [item for item in items if truth(item, "animal")]
    for item in seen:
        if item.thing.legs is not None:
            legs = str(item.thing.legs)
            asker.ask("legs", legs, (), needs("legs", [item]), blind=True, x=item.thing.a)
    if len({i.name for i in seen}) < 2 or any(item.thing.size is None for item in seen):
        return
    for more, most, sign in (("larger", "largest", -1), ("smaller", "smallest", 1)):
        first, *others = sorted(seen, key=lambda item: sign * item.thing.size)
        if all(abs(first.thing.size - other.thing.size) >= STEPS for other in others):
            facts, also = needs("larger", [first]), needs("larger", others)
            asker.ask("larger", first.name, [first], facts, also, most=most)
            pair = [first, choice(asker.rng, others)]
            x, y = (pair[i].thing.a for i in asker.rng.permutation(2))
            words = {"more": more, "x": x, "y": y}
            facts, also = needs("larger", pair[:1]), needs("larger", pair[1:])
            asker.ask("larger", first.name, (), facts, also, True, way="larger of two", **words)
