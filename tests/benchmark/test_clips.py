"""Clips: what is seen, moves and sounds is what the questions say."""

import numpy as np
import pytest

from optmerge_core.benchmark.tasks.clips import (
    FRAMES,
    NEEDS,
    NOTES,
    PITCHES,
    RATE,
    SHAPES,
    STEP,
    WAYS,
    clip,
    questions,
    timbre,
    told,
)


@pytest.fixture(scope="module")
def clips():
    return [clip(np.random.default_rng([7, i])) for i in range(60)]


def test_the_same_generator_gives_the_same_clip():
    first, again = (clip(np.random.default_rng(3)) for _ in range(2))
    assert np.array_equal(first.frames, again.frames)
    assert np.array_equal(first.sound, again.sound) and questions(first) == questions(again)


def test_a_clip_is_what_the_processors_expect(clips):
    for item in clips:
        assert item.frames.shape == (FRAMES, 56, 56, 3) and item.frames.dtype == np.uint8
        assert item.sound.shape == (RATE,) and item.sound.dtype == np.float32
        assert 0.1 < np.abs(item.sound).max() <= 1
        assert len(item.things) in (2, 3) and 1 <= len(item.notes) <= NOTES
        assert sum(thing.way is not None for thing in item.things) == 1
        assert len({t.body.color for t in item.things}) == len(item.things)
        assert len({t.body.shape for t in item.things}) == len(item.things)


def test_only_the_mover_moves_and_it_moves_its_way(clips):
    for item in clips:
        dx, dy = WAYS[item.mover.way]
        for thing in item.things:
            first, last = thing.at(0).center, thing.at(FRAMES - 1).center
            way = (dx, dy) if thing is item.mover else (0, 0)
            moved = (last[0] - first[0], last[1] - first[1])
            assert moved == tuple((FRAMES - 1) * STEP * d for d in way)
            for number in range(FRAMES):
                x, y = (int(c) for c in thing.at(number).center)
                if thing is item.mover and 0 <= x < 56 and 0 <= y < 56:
                    background = item.frames[number, 0, 0].astype(int)
                    assert np.abs(item.frames[number, y, x] - background).max() > 20


def test_a_place_is_the_same_in_every_frame_but_the_movers_last(clips):
    for item in clips:
        for thing in item.things:
            frames = range(FRAMES) if thing is not item.mover else (1, 2)
            assert {thing.at(number).place for number in frames} == {thing.body.place}


def test_there_is_sound_in_as_many_slots_as_there_are_notes(clips):
    for item in clips:
        length = RATE // NOTES
        loud = [item.sound[i * length : (i + 1) * length].std() > 0.05 for i in range(NOTES)]
        assert sum(loud) == len(item.notes)


@pytest.mark.parametrize("pitch", PITCHES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_tone_has_its_pitch_and_shapes_sound_different(shape, pitch):
    seconds = np.arange(RATE) / RATE
    tone = timbre(shape, PITCHES[pitch], seconds)
    assert np.abs(tone).max() <= 1.05
    spectrum = np.abs(np.fft.rfft(tone))
    assert spectrum.argmax() == PITCHES[pitch]  # one bin is one Hz
    for other in SHAPES:
        if other != shape:
            partner = timbre(other, PITCHES[pitch], seconds)
            assert np.corrcoef(tone**2, partner**2)[0, 1] < 0.99


def test_answers_follow_from_what_the_needed_modalities_tell(clips):
    """Two clips that tell the same of the modalities a question needs have the same answer."""
    known = {}
    for item in clips:
        for question, answer, kind in questions(item):
            key = (question, *(told(item, modality) for modality in NEEDS[kind]))
            assert known.setdefault(key, answer) == answer
    assert {kind for c in clips for _, _, kind in questions(c)} == set(NEEDS)


def test_answers_by_hand():
    item = next(
        c
        for c in (clip(np.random.default_rng([7, i])) for i in range(60))
        if len(c.notes) == 2 and c.mover in c.notes
    )
    answers = {question: answer for question, answer, _ in questions(item)}
    first, still = item.notes[0], next(n for n in item.notes if n is not item.mover)
    assert answers["how many sounds ?"] == "2"
    assert answers["what color is the first sound ?"] == first.body.color
    assert answers["does the moving thing sound ?"] == "yes"
    assert answers["how high is the moving thing ?"] == item.mover.pitch
    assert answers["what color is the still sound ?"] == still.body.color
    assert told(item, "video") == f"{item.mover.body.shape}-{item.mover.way}"
    assert told(item, "audio").startswith(f"{first.pitch}-{first.body.shape} ")
    seen, body = told(item, "vision").split()[0], item.things[0].body
    assert seen == f"{body.color}-{body.shape}-{body.place.replace(' ', '-')}"
