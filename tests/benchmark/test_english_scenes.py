"""Scenes and what is asked about them: right answers, no doubt, nothing of the test in training."""

from collections import Counter

import numpy as np
import pytest

from optmerge_core.benchmark.tasks.english import scenes
from optmerge_core.benchmark.tasks.english.drawing import IMAGE_SIZE, box_text, covered
from optmerge_core.benchmark.tasks.english.things import all_facts, kept, kept_place, things
from optmerge_core.benchmark.tasks.scenes import TURNS

TASKS = {"vqa": scenes.vqa, "grounding": scenes.grounding}
LEVELS = ("caption", "easy", "medium", "full")
PLURALS = {thing.plural: name for name, thing in things().items() if thing.plural}


@pytest.fixture(scope="module")
def drawings():
    """{(task, split, level): [(Drawing, the Scene it shows)]}, drawn when first asked for."""
    found, stage = {}, scenes.stage

    def draw(task, split, level="full", count=120):
        key = task, split, level
        if key not in found:
            found[key], shown = [], []
            scenes.stage = lambda *given: shown.append(stage(*given)) or shown[-1]
            try:
                for seed in range(count):
                    drawing = TASKS[task](np.random.default_rng(seed), split, level)
                    found[key].append((drawing, shown[-1]))
            finally:
                scenes.stage = stage
        return found[key]

    return draw


def turns(drawn, *kinds):
    for drawing, scene in drawn:
        for turn in drawing.turns:
            if turn.kind in kinds:
                yield turn, scene


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("task", TASKS)
def test_a_drawing_is_the_same_every_time(task, level):
    first, second = (TASKS[task](np.random.default_rng(5), "train", level) for _ in range(2))
    assert first.image.size == (IMAGE_SIZE, IMAGE_SIZE) and first.image.mode == "RGB"
    assert first.image.tobytes() == second.image.tobytes()
    assert first.turns == second.turns and first.cells == second.cells
    assert 1 <= len(first.turns) <= TURNS


@pytest.mark.parametrize("split", ("train", "validation", "test"))
def test_things_lie_apart_and_within_the_picture(drawings, split):
    for _, scene in drawings("vqa", split):
        for item in scene.items:
            assert min(item.outer) >= 0 and max(item.outer) <= IMAGE_SIZE
            assert all(o <= b for o, b in zip(item.outer[:2], item.box[:2], strict=True))
            assert all(o >= b for o, b in zip(item.outer[2:], item.box[2:], strict=True))
            assert item.size >= 16
            for other in scene.items:
                across, down = (
                    max(item.outer[axis], other.outer[axis])
                    >= min(item.outer[axis + 2], other.outer[axis + 2])
                    for axis in (0, 1)
                )
                assert item is other or across or down


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", ("train", "validation"))
def test_training_shows_nothing_where_it_is_kept_for_the_test(drawings, task, split):
    for level in LEVELS:
        for drawing, scene in drawings(task, split, level):
            assert not any(kept_place(item.name, item.region) for item in scene.items)
            assert not any(turn.held_out for turn in drawing.turns)
    held_out = [turn.held_out for turn, _ in turns(drawings(task, "test"), "name")]
    assert 0.1 < np.mean(held_out) < 0.5


def fact_asked(question):
    """The fact of a question of the kind which or use, by how it ends."""
    found = [f for f, says in all_facts().items() if question.endswith(f"{says.that}?")]
    return max(found, key=lambda fact: len(all_facts()[fact].that))


def test_facts_asked_in_training_are_none_of_those_kept(drawings):
    """Neither of the answer nor of what else one could have answered."""
    for split in ("train", "test"):
        known, new = 0, 0
        for turn, scene in turns(drawings("vqa", split), "which", "use"):
            fact = fact_asked(turn.question)
            others = [item.name for item in scene.items if item.name != turn.answer]
            if kept(fact, turn.answer):
                new += 1
                assert turn.held_out
            else:
                known += 1
                assert not any(kept(fact, name) for name in others)
        assert known > 20 and (new > 20 if split == "test" else new == 0)


def test_legs_and_sizes_asked_in_training_are_none_of_those_kept(drawings):
    for turn, scene in turns(drawings("vqa", "train"), "larger"):
        animals = [item.name for item in scene.items if item.thing.size]
        if turn.blind:
            animals = [name for name in animals if f" {name}" in turn.question]
        assert turn.answer in animals and not any(kept("larger", name) for name in animals)
    for turn, scene in turns(drawings("vqa", "train"), "legs"):
        known = {i.name for i in scene.items if not kept("legs", i.name)}
        assert turn.answer in {str(things()[name].legs) for name in known}


def test_which_and_use_have_one_answer_in_the_picture(drawings):
    for turn, scene in turns(drawings("vqa", "test"), "which", "use"):
        truths = {i.name: i.thing.facts.get(fact_asked(turn.question), False) for i in scene.items}
        assert None not in truths.values()
        assert [name for name, true in truths.items() if true] == [turn.answer]


def test_counts_are_right(drawings):
    named = 0
    for turn, scene in turns(drawings("vqa", "train") + drawings("vqa", "train", "easy"), "count"):
        for plural, name in PLURALS.items():
            if f" {plural} " in turn.question or turn.question.endswith(f" {plural}."):
                named += 1
                assert int(turn.answer) == sum(item.name == name for item in scene.items)
        if " things are" in turn.question or " things do you" in turn.question:
            assert int(turn.answer) == len(scene.items)
    assert named > 20


def test_boxes_are_those_of_what_is_meant(drawings):
    """A thing by its name has its own box, the outermost no other farther out; all are boxes."""
    for turn, scene in turns(drawings("grounding", "train"), "name", "side", "size", "color"):
        boxes = {box_text(i.box): i for i in scene.items} | {
            box_text(i.outer): i for i in scene.items
        }
        item = boxes[turn.answer]
        left, top, right, bottom = map(int, turn.answer.split())
        assert 0 <= left < right <= 99 and 0 <= top < bottom <= 99
        if turn.kind == "name":
            assert item.name in turn.question
            assert sum(other.name == item.name for other in scene.items) == 1
        if turn.question.endswith("the thing on the left."):
            assert item.center[0] == min(other.center[0] for other in scene.items)
        if "biggest" in turn.question:
            same = [other for other in scene.items if other.name == item.name]
            assert item.size == max(other.size for other in same) and len(same) > 1


def test_yes_and_no_are_equally_often_right(drawings):
    drawn = [*drawings("vqa", "train"), *drawings("vqa", "train", "easy")]
    for kind in ("exists", "relation", "is"):
        answers = Counter(turn.answer for turn, _ in turns(drawn, kind))
        assert 0.35 < answers["yes"] / (answers["yes"] + answers["no"]) < 0.65, (kind, answers)


def test_every_kind_is_asked_and_medium_keeps_some_for_the_experts(drawings):
    for task, few, all_kinds in (
        ("vqa", scenes.VQA, scenes.VQA_FULL),
        ("grounding", scenes.GROUNDING, scenes.GROUNDING_FULL),
    ):
        for level, kinds in (("easy", all_kinds), ("medium", few), ("full", all_kinds)):
            drawn = drawings(task, "train", level)
            assert {turn.kind for d, _ in drawn for turn in d.turns} == set(kinds)


def test_only_what_names_its_things_is_blind(drawings):
    """Where the picture alone tells which thing is meant, words alone do not answer."""
    seen = Counter()
    for drawing, _ in drawings("vqa", "test"):
        for turn in drawing.turns:
            seen[turn.kind] += turn.blind
            pointed = "the thing" in turn.question.lower() or "here" in turn.question
            assert not (turn.blind and pointed)
    assert {kind for kind, count in seen.items() if count} == {"legs", "larger", "color"}


def test_cells_name_the_things_that_lie_in_them(drawings):
    for drawing, scene in drawings("vqa", "train"):
        for item in scene.items:
            cells = [drawing.cells.get(cell, [""]) for cell in covered(item.box, 0.01)]
            assert any(item.name == words[0] for words in cells)
        names = {item.name for item in scene.items}
        for words in drawing.cells.values():
            assert 1 <= len(words) <= 3
            assert words[0] in names or words[1] in ("circle", "square")
        named = {item.box: item.name for item in scene.items}
        assert drawing.boxes.keys() <= drawing.cells.keys() and set(drawing.boxes.values())
        for cell, box in drawing.boxes.items():
            assert drawing.cells[cell][0] == named[box] and cell in covered(box, 0.01)


def test_a_caption_names_everything_in_reading_order(drawings):
    for task in TASKS:
        for drawing, scene in drawings(task, "train", "caption"):
            (turn,) = drawing.turns
            said = turn.answer.split(", ")
            assert len(said) == len(scene.items)
            for text, item in zip(said, scene.reading_order(), strict=True):
                assert text.startswith(item.full_name)
