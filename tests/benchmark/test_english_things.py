"""The table of things, their pictures, and which facts are kept for the test."""

import numpy as np
import pytest
from PIL import Image

from optmerge_core.benchmark.tasks.english.things import (
    ACROSS,
    FACTS,
    PAINTS,
    SIDE,
    all_facts,
    confused,
    folder,
    kept,
    names,
    pack,
    picture,
    rows,
    things,
)


def test_every_look_has_a_picture_and_all_of_them_are_small():
    looks = [look for thing in things().values() for look in thing.looks]
    with Image.open(folder() / "things.png") as sheet:
        assert sheet.size == (ACROSS * SIDE, -(-len(looks) // ACROSS) * SIDE)
    assert [look.index for look in looks] == list(range(len(looks)))
    assert all(min(picture(look).size) >= 12 for look in looks)
    assert len(things()) >= 120
    assert sum(file.stat().st_size for file in folder().iterdir()) < 1_000_000


def test_facts_of_some_things():
    def facts(name):
        return {fact for fact in FACTS if things()[name].facts.get(fact)}

    assert facts("duck") == {"animal", "bird", "fly"}
    assert facts("whale") == {"animal", "swim"}
    assert facts("apple") == {"food", "fruit"}
    assert facts("bus") == {"vehicle", "wheels"}
    assert things()["pepper"].facts["fruit"] is None  # botanists and cooks disagree
    assert things()["airplane"].facts["wheels"] is None
    assert things()["elephant"].size > things()["cat"].size + 1 > things()["ant"].size + 2
    legs = {name: things()[name].legs for name in ("spider", "bee", "owl", "cow", "snake")}
    assert legs == {"spider": 8, "bee": 6, "owl": 2, "cow": 4, "snake": 0}


def test_articles():
    assert [things()[name].a for name in ("apple", "dog", "sheep", "bread")] == [
        "an apple",
        "a dog",
        "a sheep",
        "bread",
    ]


def test_facts_are_consistent():
    """What follows from another fact: birds, insects and fish are animals, fruits are food."""
    for fact, general in {
        "bird": "animal",
        "insect": "animal",
        "swim": "animal",
        "fruit": "food",
        "vegetable": "food",
    }.items():
        assert set(names(fact, True)) <= set(names(general, True))
    for thing in things().values():
        animal = thing.facts.get("animal", False)
        assert animal or (thing.size is None and thing.legs is None)
        assert not (animal and thing.facts.get("vehicle", False))


def test_all_facts_have_some_kept_for_the_test_and_some_not():
    for fact in FACTS:
        shares = [kept(fact, name) for name in names(fact, True)]
        assert 0 < np.mean(shares) <= 0.5, fact
    uses = [kept(f, n) for f in all_facts() if f.startswith("use:") for n in names(f, True)]
    assert 0.1 < np.mean(uses) < 0.5


def test_what_may_be_called_alike_is_confused():
    assert confused("fish", ["dog", "shark"]) and confused("shark", ["fish"])
    assert not confused("fish", ["dog", "whale"])


@pytest.mark.parametrize("paint", PAINTS)
def test_a_painted_thing_has_its_paint(paint):
    """The commonest hue of the heart, whose picture is nearly all of one colour."""
    thing = things()["heart"]
    pixels = np.asarray(picture(thing.looks[0], paint)).reshape(-1, 4)
    found = np.median(pixels[pixels[:, 3] == 255][:, :3], axis=0)
    distance = {name: np.abs(found - 255 * np.array(rgb)).sum() for name, rgb in PAINTS.items()}
    assert min(distance, key=distance.get) == paint


def test_pack_puts_the_pictures_in_the_order_of_the_table(tmp_path, monkeypatch):
    """Each file is one plain colour, its number; the package itself is not shipped."""
    package, packed = tmp_path / "package", tmp_path / "packed"
    images = package / "img" / "google" / "64"
    images.mkdir(parents=True)
    packed.mkdir()
    files = [look.partition(":")[0] for row in rows() for look in row["looks"].split()]
    for number, file in enumerate(files):
        Image.new("RGBA", (SIDE, SIDE), (number, 7, 9, 255)).save(images / f"{file}.png")
    monkeypatch.setattr("optmerge_core.benchmark.tasks.english.things.folder", lambda: packed)
    pack(package)
    with Image.open(packed / "things.png") as sheet:
        corners = np.asarray(sheet)[::SIDE, ::SIDE, 0].ravel()[: len(files)]
    assert corners.tolist() == list(range(len(files)))
