"""What is asked in the study `smol_omni`: a picture or its description, a voice, an answer.

An exchange is one question and its answer. Its picture may be given as such or told in words, and
what a voice says in it may be heard or stand in its place in writing; so the same exchanges teach
the common language model (all in words), the vision specialist (the picture as such) and the
speech specialist (the voice as such), and ask the composed model, which is given both.
"""

from dataclasses import dataclass

import numpy as np

from optmerge_core.benchmark.tasks.english.asking import SAID, sentence
from optmerge_core.benchmark.tasks.english.cast import STEPS
from optmerge_core.benchmark.tasks.english.drawing import reserved
from optmerge_core.benchmark.tasks.english.lettering import allowed, words
from optmerge_core.benchmark.tasks.english.telling import DRAW, Asked, Shown, shown
from optmerge_core.benchmark.tasks.english.things import all_facts, kept, things
from optmerge_core.benchmark.tasks.samples import SPLITS
from optmerge_core.benchmark.tasks.scenes import choice

NUMBERS = "one two three four five six seven eight nine ten".split()
ORDINALS = ("first", "second", "third")
WRITE = ("Write down what you hear.", "What does the voice say?", "Write what is said.")
REPEAT = ("Repeat the {nth} word.", "Which word comes {nth}?", "Say the {nth} word again.")
SPELL = ("Spell {word}.", "How do you spell {word}?", "Spell the word {word}.")
LISTS = ("words", "names", "goods")


@dataclass(frozen=True)
class Exchange:
    """skill: a key of SKILLS; shown: a picture, or None; asked: what is heard, and the answer."""

    skill: str
    shown: Shown | None
    asked: Asked


# ---------------------------------------------------------------- without a picture


def known(rng, split):
    """A question of general knowledge that one word answers."""
    return choice(rng, (a_fact, a_fact, legs, larger, after, total))(rng, split)


def _allowed(rng, split, draw, is_kept):
    """What `draw()` gives, drawn anew until training may ask it; in the test half are kept ones."""
    wanted = split == "test" and rng.random() < 0.5
    while bool(is_kept(drawn := draw())) != wanted:
        pass
    return drawn, wanted


def a_fact(rng, split):
    """Is it true of a thing? As often yes as no."""

    def drawn():
        fact = choice(rng, list(all_facts()))
        value = bool(rng.integers(2))
        return fact, choice(rng, [n for n, t in things().items() if holds(t, fact) is value])

    def holds(thing, fact):
        return thing.facts.get(fact, False)

    (fact, name), held_out = _allowed(rng, split, drawn, lambda found: kept(*found))
    question = sentence(all_facts()[fact].ask.format(things()[name].a)) + "?"
    return Asked(question, "yes" if holds(things()[name], fact) else "no", "fact", held_out)


def legs(rng, split):
    walking = [thing for thing in things().values() if thing.legs is not None]
    thing, held_out = _allowed(
        rng, split, lambda: choice(rng, walking), lambda thing: kept("legs", thing.name)
    )
    question = sentence(choice(rng, SAID["legs"]).format(x=thing.a))
    return Asked(question, str(thing.legs), "legs", held_out)


def larger(rng, split):
    sized = [thing for thing in things().values() if thing.size]

    def drawn():
        while True:
            pair = [choice(rng, sized) for _ in range(2)]
            if abs(pair[0].size - pair[1].size) >= STEPS:
                return pair

    more, sign = choice(rng, (("larger", 1), ("smaller", -1)))
    pair, held_out = _allowed(
        rng, split, drawn, lambda pair: any(kept("larger", thing.name) for thing in pair)
    )
    question = choice(rng, SAID["larger of two"]).format(more=more, x=pair[0].a, y=pair[1].a)
    answer = max(pair, key=lambda thing: sign * thing.size)
    return Asked(sentence(question), answer.name, "larger", held_out)


def after(rng, split):
    """Days and months are all asked for in training; there are too few to keep some."""
    what, group = choice(rng, (("day", words("days")), ("month", words("months"))))
    place, (side, step) = int(rng.integers(len(group))), choice(rng, (("after", 1), ("before", -1)))
    question = f"Which {what} comes {side} {group[place]}?"
    return Asked(question, group[(place + step) % len(group)], "order")


def total(rng, split):
    (a, b), held_out = _allowed(
        rng, split, lambda: rng.integers(1, 11, 2).tolist(), lambda pair: reserved("sum", *pair)
    )
    return Asked(f"What is {NUMBERS[a - 1]} plus {NUMBERS[b - 1]}?", str(a + b), "sum", held_out)


def a_word(rng, split, group="words"):
    """A word, and whether training never shows and says it."""
    word = allowed(rng, split, lambda: choice(rng, words(group)), "word")
    return word, reserved("word", word)


def spell(rng, split):
    word, held_out = a_word(rng, split)
    return Asked(choice(rng, SPELL).format(word=word), " ".join(word), "spell", held_out)


def repeat(rng, split):
    """One of three words."""
    found = dict(a_word(rng, split) for _ in range(3))
    while len(found) < 3:
        found |= [a_word(rng, split)]
    place = int(rng.integers(3))
    word = list(found)[place]
    written = choice(rng, REPEAT).format(nth=ORDINALS[place])
    return Asked(" ".join(found), word, "repeat", found[word], written)


def write(rng, split):
    """What is said, to the letter: a question, or words of a list."""
    draw = choice(rng, (known, spell, some_words, some_words, about_a_picture))
    heard = draw(rng, split)
    return Asked(heard.heard, heard.heard, "write", heard.held_out, choice(rng, WRITE))


def some_words(rng, split):
    found = dict(a_word(rng, split, choice(rng, LISTS)) for _ in range(int(rng.integers(2, 6))))
    return Asked(" ".join(found), "", "", any(found.values()))


def about_a_picture(rng, split):
    asked = shown(choice(rng, tuple(DRAW)), split, int(rng.integers(2**31)), seed=43).asked
    return choice(rng, [turn for turn in asked if not turn.written] or asked)


SKILLS = {"knowledge": known, "spell": spell, "repeat": repeat, "write": write}
"""Skill -> (rng, split) -> what is asked; the others are the pictures of `telling.DRAW`."""
PICTURES = tuple(DRAW)


def exchange(skill, split, index, level="full", seed=0):
    """Exchange number `index` of a split; the same arguments give the same exchange everywhere.

    level: none has more than one; training's streams of samples name it.
    """
    rng = np.random.default_rng([seed, list(SPLITS).index(split), _number(skill), index])
    if skill in PICTURES:
        picture = shown(skill, split, index, seed)
        return Exchange(skill, picture, choice(rng, picture.asked))
    return Exchange(skill, None, SKILLS[skill](rng, split))


def _number(skill):
    return 310 + [*PICTURES, *SKILLS].index(skill)


def unheard(text):
    """Whether a text names a thing that no voice names in training or validation: a tenth of them.

    The common language model has read of it and the vision specialist has seen it.
    """
    said = set("".join(c if c.isalpha() else " " for c in text.lower()).split())
    return any(said & names for names in _never_said())


def _never_said():
    for name, thing in things().items():
        if reserved("voice", name, share=0.1):
            yield {part for part in (name, thing.plural) if part and " " not in part}
