"""Scenes of things a child knows: `vqa` asks about them, `grounding` asks for their boxes."""

from optmerge_core.benchmark.tasks.english.asking import (
    Asker,
    ask_animals,
    ask_colors,
    ask_counts,
    ask_facts,
    ask_names,
    ask_yes_no,
    facts_here,
    needs,
)
from optmerge_core.benchmark.tasks.english.cast import draw_cast
from optmerge_core.benchmark.tasks.english.drawing import Drawing, Turn, box_text
from optmerge_core.benchmark.tasks.english.stage import stage
from optmerge_core.benchmark.tasks.english.where import (
    beside,
    called,
    outermost,
    places,
    unlike,
)
from optmerge_core.benchmark.tasks.scenes import choice, converse

FARTHEST = {"leftmost": "on the left", "rightmost": "on the right"}
FARTHEST |= {"highest": "at the top", "lowest": "at the bottom"}
BIGGER = 1.25  # times as long, where one of several is called the biggest


# ---------------------------------------------------------------- boxes


def ask_box(asker, kind, x, item, facts=(), also=(), box=None):
    asker.ask(kind, box_text(box or item.box), [item], facts, also, way="box", x=x)


def ask_boxes(asker):
    items = asker.items
    for item in items:
        if x := called(items, item):
            ask_box(asker, "color" if item.thing.varies else "name", x, item)
            for side, other in beside(items, item):
                ask_box(asker, "relation", f"the thing {side} {x}", other)
        if item.ground and unlike(items, item, lambda i: i.ground):
            ground = " ".join(item.ground)
            ask_box(asker, "color", f"the thing on the {ground}", item)
            ask_box(asker, "color", f"the {ground}", item, box=item.outer)
    for where, item in places(items):
        ask_box(asker, "side", f"the thing {where}", item)


def ask_groups(asker):
    """The one of several of a name, or of a fact, that is outermost or largest; or the only one."""
    items = asker.items
    groups = {}
    for item in items:
        groups.setdefault(item.name, []).append(item)
    for name, same in groups.items():
        if len(same) > 1:
            ask_outermost(asker, f"the {{}} {name}", f"the {name}", same)
            small, *_, large = by_size = sorted(same, key=lambda i: i.size)
            if large.size >= BIGGER * by_size[-2].size:
                ask_box(asker, "size", f"the biggest {name}", large)
            if by_size[1].size >= BIGGER * small.size:
                ask_box(asker, "size", f"the smallest {name}", small)
    for fact, says, true in facts_here(items):
        also = needs(fact, [item for item in items if item not in true])
        if len(true) == 1 and len(items) > 1:
            ask_box(asker, "fact", says.the, true[0], needs(fact, true), also)
        elif len({item.name for item in true}) > 1 and says.the.count(" ") == 1:
            facts = needs(fact, true)
            ask_outermost(asker, says.the.replace("the ", "the {} "), says.the, true, facts, also)


def ask_outermost(asker, farthest, the, same, facts=(), also=()):
    for word, side in FARTHEST.items():
        if item := outermost(same, side):
            x = farthest.format(word) if asker.rng.random() < 0.5 else f"{the} {side}"
            ask_box(asker, "side", x, item, facts, also)


# ---------------------------------------------------------------- the tasks

COUNTS = {"caption": (1, 6), "easy": (1, 3), "medium": (3, 6), "full": (3, 6)}
"""Level -> least and most things in a picture."""
VQA = {"name": 2, "place": 1, "color": 2, "exists": 1, "which": 2}
VQA_FULL = VQA | {"count": 2, "relation": 2, "is": 1, "use": 1, "larger": 1, "legs": 1}
"""Kind of question -> how often it is asked."""
VQA_THEMES = {
    "plain": (2, ("name", "place", "relation")),
    "repeated": (2, ("count",)),
    "nouns": (3, ("which", "is")),
    "uses": (1.5, ("use",)),
    "animals": (1.5, ("larger",)),
    "legs": (1, ("legs",)),
    "twins": (1, ("color", "relation")),
}
"""Theme of a picture -> how often it is drawn, and the kinds of question it is drawn for."""
GROUNDING = {"name": 4, "color": 3}
GROUNDING_FULL = GROUNDING | {"side": 2, "relation": 1, "size": 1, "fact": 2}
GROUNDING_THEMES = {
    "plain": (2, ("name", "relation")),
    "repeated": (2, ("side", "size")),
    "nouns": (2, ("fact", "side")),
    "uses": (1, ("fact",)),
    "twins": (1, ("color",)),
}
TRIES = 8  # pictures drawn until one has a question; nearly always the first has


def drawn(rng, split, count, themes):
    """A scene, and the kinds of question that its theme is for."""
    theme = weighted(rng, {name: weight for name, (weight, _) in themes.items()})
    return stage(rng, draw_cast(rng, split, count, theme), split), themes[theme][1]


def weighted(rng, weights):
    """One of the keys, by their weights."""
    at = rng.random() * sum(weights.values())
    for key, weight in weights.items():
        at -= weight
        if at < 0:
            return key
    return key


def about(rng, split, level, asking, weights, themes):
    """A picture and what the functions ask of it, its theme's own kinds four times as often."""
    least, most = COUNTS[level]
    for _ in range(TRIES):
        scene, kinds = drawn(rng, split, int(rng.integers(least, most + 1)), themes)
        asker = Asker(rng, scene, split)
        for ask in asking:
            ask(asker)
        often = {kind: w * (4 if kind in kinds else 1) for kind, w in weights.items()}
        if turns := converse(rng, asker.turns, often):
            return Drawing(scene.image, turns, scene.cells, scene.boxes)
    raise RuntimeError(f"no question about {TRIES} pictures at level {level}")


def vqa(rng, split, level):
    """A scene and questions about it, answered in a word or a number."""
    if level == "caption":
        return vqa_caption(rng, split)
    asking = (ask_names, ask_colors, ask_counts, ask_yes_no, ask_facts, ask_animals)
    return about(rng, split, level, asking, VQA if level == "medium" else VQA_FULL, VQA_THEMES)


def grounding(rng, split, level):
    """A scene and things to point to, each answered by its box."""
    if level == "caption":
        return grounding_caption(rng, split)
    weights = GROUNDING if level == "medium" else GROUNDING_FULL
    return about(rng, split, level, (ask_boxes, ask_groups), weights, GROUNDING_THEMES)


def caption(rng, split, most, ways):
    """All things in reading order, said in one of the ways: {question: what is said of an item}."""
    scene, _ = drawn(rng, split, int(rng.integers(1, most + 1)), VQA_THEMES)
    question = choice(rng, list(ways))
    said = ", ".join(ways[question](item) for item in scene.reading_order())
    return Drawing(scene.image, [Turn(question, said, "caption")], scene.cells, scene.boxes)


def vqa_caption(rng, split):
    placed = {
        question: lambda item: f"{item.full_name} {item.region}"
        for question in ("What is where?", "Say what is where.", "Describe where things are.")
    }
    named = {
        question: lambda item: item.full_name
        for question in ("Name all things.", "What is in the picture?", "Describe the picture.")
    }
    grounded = {
        question: lambda item: " on ".join([item.full_name, *(item.ground or ())[:1]])
        for question in ("What is on which color?", "Name all things and the colors behind them.")
    }
    return caption(rng, split, COUNTS["caption"][1], placed | named | grounded)


def grounding_caption(rng, split):
    """At most two things, as a box takes a dozen tokens."""
    ways = {
        question: lambda item: f"{item.full_name} {box_text(item.box)}"
        for question in ("Give the boxes of all things.", "Where is everything?", "Box all things.")
    }
    return caption(rng, split, 2, ways)
