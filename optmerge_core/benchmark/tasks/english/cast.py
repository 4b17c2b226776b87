"""Which things a scene shows: drawn so that there is something to ask about.

In training and validation what a theme asks about is never a fact kept for the test; in the test
two fifths of the scenes are drawn for such a fact.
"""

from optmerge_core.benchmark.tasks.english.stage import look_of
from optmerge_core.benchmark.tasks.english.things import (
    PAINTS,
    all_facts,
    confused,
    kept,
    names,
    things,
)
from optmerge_core.benchmark.tasks.scenes import choice

STEPS = 2  # classes of size between animals of which one is clearly larger


def some(rng, among, count, but=()):
    """Up to `count` different names, in random order."""
    left = [name for name in among if name not in but]
    return [left[i] for i in rng.permutation(len(left))[: max(count, 0)]]


def known(split, fact, among):
    """The names of whose fact a question may be asked."""
    return [name for name in among if split == "test" or not kept(fact, name)]


def for_test(rng, split, fact, among):
    """In two fifths of the test's scenes only names whose fact is kept for it, if there are any."""
    among = known(split, fact, among)
    if split == "test":
        fresh = rng.random() < 0.4
        among = [name for name in among if kept(fact, name) == fresh] or among
    return among


def plain(rng, split, count):
    return some(rng, things(), count)


def repeated(rng, split, count):
    """One thing several times, others once."""
    same = choice(rng, [name for name, thing in things().items() if thing.plural])
    times = int(rng.integers(2, max(count, 2) + 1)) if count > 1 else 1
    return [same] * times + some(rng, things(), count - times, [same])


def told_by(rng, split, count, facts):
    """One or two things of which one of the facts is true, others of which it is false."""
    askable = [fact for fact in facts if known(split, fact, names(fact, True))]
    fact = choice(rng, askable)
    true = for_test(rng, split, fact, names(fact, True))
    chosen = some(rng, true, 2 if count > 3 and rng.random() < 0.35 else 1)
    others = for_test(rng, split, fact, names(fact, False))
    return chosen + some(rng, others, count - len(chosen))


def nouns(rng, split, count):
    return told_by(rng, split, count, [f for f in all_facts() if not f.startswith("use:")])


def uses(rng, split, count):
    return told_by(rng, split, count, [f for f in all_facts() if f.startswith("use:")])


def animals(rng, split, count):
    """Two or three animals of which one is clearly the largest or smallest, and other things."""
    sized = [name for name, thing in things().items() if thing.size]
    first = choice(rng, for_test(rng, split, "larger", sized))
    sizes = {name: things()[name].size for name in known(split, "larger", sized)}
    away = choice(
        rng, [d for d in (-1, 1) if any((s - sizes[first]) * d >= STEPS for s in sizes.values())]
    )
    others = [name for name, size in sizes.items() if (size - sizes[first]) * away >= STEPS]
    chosen = [first, *some(rng, others, 2 if count > 3 and rng.random() < 0.5 else 1)]
    return chosen + some(rng, names("animal", False), count - len(chosen))


def legged(rng, split, count):
    """One animal whose legs one can count, and other things."""
    legs = {name: thing.legs for name, thing in things().items() if thing.legs is not None}
    number = choice(rng, sorted({legs[name] for name in known(split, "legs", legs)}))
    same = [name for name in legs if legs[name] == number]
    first = choice(rng, for_test(rng, split, "legs", same))
    return [first, *some(rng, things(), count - 1, [first])]


def twins(rng, split, count):
    """The same thing in two colours, and others."""
    same = choice(rng, [name for name, thing in things().items() if thing.varies])
    return [same] * min(2, count) + some(rng, things(), count - 2, [same])


THEMES = {
    "plain": plain,
    "repeated": repeated,
    "nouns": nouns,
    "uses": uses,
    "animals": animals,
    "legs": legged,
    "twins": twins,
}


def _look(rng, name, theme, before):
    """A picture of it: as before where it is repeated, in another colour where it has a twin."""
    thing = things()[name]
    if theme == "repeated" and name in before and rng.random() < 0.7:
        return before[name]
    colors = list(PAINTS) if thing.painted else [look.color for look in thing.looks]
    if name in before and thing.varies:
        _, look, paint = before[name]
        colors = [color for color in colors if color != (paint or look.color)]
    return look_of(rng, thing, choice(rng, colors))


def draw_cast(rng, split, count, theme):
    """[(Thing, Look, paint)] of a theme, `count` at most, in random order; no two confused."""
    drawn, before = [], {}
    for name in THEMES[theme](rng, split, count)[:count]:
        if not confused(name, before):
            before[name] = _look(rng, name, theme, before)
            drawn.append(before[name])
    return [drawn[i] for i in rng.permutation(len(drawn))]
