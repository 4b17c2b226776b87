"""The things that scenes show: their pictures, and what a child knows about them.

`data/benchmark/smol/things/` has the table and one sheet of pictures (Noto Emoji). A fact is a key
of FACTS, or "use:cut wood" for what the thing is used to do; it is true or false of a thing, or
None where people may disagree, and then nobody is asked.
"""

import csv
import sys
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from optmerge_core.benchmark.tasks.english.drawing import reserved
from optmerge_core.places import checkout

SIDE = 64  # pixels of a picture in the sheet, each way
ACROSS = 12  # pictures in a row of the sheet

PAINTS = {
    "red": (0.88, 0.12, 0.14),
    "yellow": (0.98, 0.80, 0.10),
    "green": (0.16, 0.66, 0.24),
    "blue": (0.16, 0.40, 0.92),
    "purple": (0.56, 0.20, 0.74),
}
"""Colours that a painted thing comes in, as shares of 255."""
HUES = {"red": 0, "blue": 150, "purple": 178}  # of 256, of the pictures that are painted


@dataclass(frozen=True)
class Fact:
    """How a fact is said: "which of these IS A BIRD", "IS it A BIRD", "THE BIRD", "BIRDS"."""

    that: str
    ask: str
    the: str
    plural: str

    @classmethod
    def noun(cls, noun, plural=""):
        a = f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
        return cls(f"is {a}", f"is {{}} {a}", f"the {noun}", plural or f"{noun}s")

    @classmethod
    def use(cls, use):
        return cls(
            f"is used to {use}",
            f"do people use {{}} to {use}",
            f"the thing used to {use}",
            f"things used to {use}",
        )


FACTS = {
    **{
        noun: Fact.noun(noun)
        for noun in ("animal", "bird", "insect", "fruit", "vegetable", "vehicle", "tool")
    },
    "instrument": Fact.noun("musical instrument"),
    "food": Fact("is food", "is {} food", "the food", "kinds of food"),
    "clothing": Fact(
        "is something to wear", "is {} something to wear", "the thing to wear", "things to wear"
    ),
    "fly": Fact("can fly", "can {} fly", "the thing that can fly", "things that can fly"),
    "wheels": Fact(
        "has wheels", "does {} have wheels", "the thing with wheels", "things with wheels"
    ),
    "swim": Fact(
        "lives in the sea",
        "does {} live in the sea",
        "the thing that lives in the sea",
        "things that live in the sea",
    ),
    "sky": Fact(
        "is seen in the sky",
        "do people see {} in the sky",
        "the thing seen in the sky",
        "things seen in the sky",
    ),
}


@dataclass(frozen=True)
class Look:
    """One picture of a thing: where it is in the sheet, and its colour if that is beyond doubt.

    near: the colour that it would not be seen on, beyond doubt or not.
    """

    index: int
    color: str = ""
    near: str = ""


@dataclass(frozen=True)
class Thing:
    """A row of things.csv.

    plural: empty if it is not counted. varies: its pictures differ in colour, so that only the
    picture tells which. size: a class of animals, 1 (ant) to 8 (whale). legs: a number. like: the
    name of a thing that one may call by this name too, or empty.
    """

    name: str
    plural: str
    looks: tuple[Look, ...]
    painted: bool
    facts: dict[str, bool | None]
    size: int | None
    legs: int | None
    like: str

    @property
    def a(self):
        """It with its article: "an apple", "bread"."""
        article = "an " if self.name[0] in "aeiou" else "a "
        return (article if self.plural else "") + self.name

    @cached_property
    def varies(self):
        colors = {look.color for look in self.looks}
        return self.painted or (len(colors) > 1 and "" not in colors)


def _facts(kinds, uses):
    """{fact: True, or None for those with a question mark}."""
    given = [*kinds.split(), *(f"use:{use}" for use in uses.split(";") if use)]
    return {fact.replace("?", ""): None if "?" in fact else True for fact in given}


def folder():
    return checkout() / "data" / "benchmark" / "smol" / "things"


@cache
def rows():
    with open(folder() / "things.csv", newline="") as file:
        return list(csv.DictReader(file))


@cache
def things():
    """{name: Thing}, as in the table."""
    found, index = {}, 0
    for row in rows():
        colors = [look.partition(":")[2] for look in row["looks"].split()]
        looks = tuple(
            Look(index + i, "" if "?" in color else color, color.strip("?"))
            for i, color in enumerate(colors)
        )
        index += len(looks)
        size, legs = (int(row[key]) if row[key] else None for key in ("size", "legs"))
        facts = _facts(row["kinds"], row["uses"])
        painted = row["painted"] == "yes"
        thing = Thing(row["name"], row["plural"], looks, painted, facts, size, legs, row["like"])
        found[thing.name] = thing
    return found


@cache
def all_facts():
    """{fact: how it is said}, with every use in the table."""
    uses = sorted({f for thing in things().values() for f in thing.facts if f.startswith("use:")})
    said = FACTS | {use: Fact.use(use.removeprefix("use:")) for use in uses}
    return {fact: says for fact, says in said.items() if names(fact, True)}


@cache
def names(fact, value):
    """Of which things a fact is true, false, or a matter of opinion (None): their names."""
    return tuple(n for n, thing in things().items() if thing.facts.get(fact, False) is value)


@cache
def kept(fact, name):
    """Whether this fact about this thing ("larger" and "legs" too) is kept for the test.

    With "truth" every fact of four things or more has some that are kept, and some that are not.
    """
    return reserved("truth", fact, name)


@cache
def kept_place(name, region):
    """Whether this thing in this ninth of the picture is kept for the test."""
    return reserved("place", name, region)


def confused(name, others):
    """Whether one may call one of the others by this name, or this thing by one of theirs."""
    return any(things()[name].like == n or things()[n].like == name for n in others)


# ---------------------------------------------------------------- pictures


@cache
def _sheet():
    with Image.open(folder() / "things.png") as image:
        return image.convert("RGBA")


def opaque(image):
    """The box of what can be seen of an RGBA picture: left, top, right, bottom."""
    return image.getchannel("A").point([0] * 64 + [255] * 192).getbbox()


@cache
def picture(look, paint=""):
    """The picture of a look, RGBA, without its margin, painted in another colour if given one."""
    row, column = divmod(look.index, ACROSS)
    left, top = column * SIDE, row * SIDE
    image = _sheet().crop((left, top, left + SIDE, top + SIDE))
    image = image.crop(opaque(image))
    return painted(image, look.color, paint) if paint else image


def painted(image, color, paint):
    """All hues near a colour become the paint, lighter and darker as they were."""
    hue = np.asarray(image.convert("RGB").convert("HSV"))[..., 0].astype(int)
    pixels = np.asarray(image).astype(float)
    dark, light = pixels[..., :3].min(-1), pixels[..., :3].max(-1)
    near = np.abs((hue - HUES[color] + 128) % 256 - 128) < 24
    near &= light - dark > 30
    white, strength = dark / 255, light / np.median(light[near])
    for channel, share in enumerate(PAINTS[paint]):
        new = 255 * (share + (1 - share) * white * 0.3) * strength
        pixels[..., channel][near] = new[near]
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8), "RGBA")


def pack(package):
    """Write things.png from the unpacked npm package, for the looks that things.csv lists."""
    files = [look.partition(":")[0] for row in rows() for look in row["looks"].split()]
    sheet = Image.new("RGBA", (ACROSS * SIDE, -(-len(files) // ACROSS) * SIDE))
    for index, file in enumerate(files):
        image = Image.open(Path(package, "img", "google", "64", f"{file}.png")).convert("RGBA")
        row, column = divmod(index, ACROSS)
        seen = image.getchannel("A").point([0] + [255] * 255)  # what is not seen compresses badly
        sheet.paste(image, (column * SIDE, row * SIDE), seen)
    sheet.save(folder() / "things.png", optimize=True)


if __name__ == "__main__":
    pack(sys.argv[1])
