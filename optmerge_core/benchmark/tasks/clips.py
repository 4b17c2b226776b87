"""Clips for the Omni benchmark: things that are seen, that move and that sound, and questions.

A clip is one second: FRAMES pictures of 56 x 56 pixels and a waveform of 16 kHz. Two or three
things of different colour and shape stand in it, each in its quarter; one of them moves; one or
more sound, one after the other, each with the timbre of its shape at a low or a high pitch. Every
question has the modalities that it needs; the counterparts of AVQA and MUSIC-AVQA.
"""

from dataclasses import dataclass

import numpy as np
from PIL import ImageDraw

from optmerge_core.benchmark.tasks.scenes import (
    COLORS,
    IMAGE_SIZE,
    Shape,
    canvas,
    choice,
    draw_shape,
    tint,
)

FRAMES = 4
STEP = 4  # pixels from one frame to the next
RATE = 16000  # samples in a clip of one second
NOTES = 3  # slots for notes, one after the other
SHAPES = ("circle", "square", "triangle", "diamond")
WAYS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
PITCHES = {"low": 262.0, "high": 880.0}  # Hz, varied by a few per cent
NEEDS = {  # kind of question -> the modalities that it takes to answer it
    "color": ("vision",),
    "shape": ("vision",),
    "place": ("vision",),
    "count": ("audio",),
    "pitch": ("audio",),
    "timbre": ("audio",),
    "mover": ("video",),
    "way": ("video",),
    "color of a sound": ("vision", "audio"),
    "place of a sound": ("vision", "audio"),
    "moving sound": ("audio", "video"),
    "pitch of the mover": ("audio", "video"),
    "color of the still sound": ("vision", "audio", "video"),
}


@dataclass(frozen=True)
class Thing:
    """A shape where it stands in the middle of the clip, its way (None: still), its pitch."""

    body: Shape
    way: str | None
    pitch: str | None

    def at(self, frame):
        """The shape in one of the FRAMES pictures."""
        dx, dy = WAYS.get(self.way, (0, 0))
        ahead = (2 * frame - (FRAMES - 1)) * STEP // 2
        left, top, right, bottom = self.body.box
        box = (left + ahead * dx, top + ahead * dy, right + ahead * dx, bottom + ahead * dy)
        return Shape(self.body.color, self.body.shape, box)


@dataclass(frozen=True)
class Clip:
    """things: left to right, top half first; notes: those that sound, in their order."""

    things: tuple[Thing, ...]
    notes: tuple[Thing, ...]
    frames: np.ndarray  # uint8 (FRAMES, 56, 56, 3)
    sound: np.ndarray  # float32 (16000,), between -1 and 1

    @property
    def picture(self):
        """The still image: one frame, which does not tell what moves."""
        return self.frames[FRAMES // 2]

    @property
    def mover(self):
        return next(thing for thing in self.things if thing.way)


def timbre(shape, frequency, seconds):
    """A tone of a shape's own timbre at times `seconds`: float64, between -1 and 1."""
    phase = 2 * np.pi * frequency * seconds
    if shape == "circle":
        return np.sin(phase)
    if shape == "square":
        return sum(np.sin(k * phase) / k for k in (1, 3, 5, 7)) / 1.1
    if shape == "triangle":
        return sum(np.sin(k * phase) / k for k in range(1, 8)) / 1.9
    return np.sin(phase) * (0.5 + 0.5 * np.sin(2 * np.pi * 18 * seconds))  # diamond: a tremolo


def record(rng, notes):
    """The notes in their slots, with soft ends, different loudness and a little noise."""
    sound = 0.01 * rng.standard_normal(RATE)
    slots = np.sort(rng.permutation(NOTES)[: len(notes)])
    length = RATE // NOTES
    seconds = np.arange(length) / RATE
    envelope = np.minimum(1, np.minimum(seconds, seconds[::-1]) / 0.02)
    for slot, thing in zip(slots, notes, strict=True):
        frequency = PITCHES[thing.pitch] * rng.uniform(0.96, 1.04)
        tone = timbre(thing.body.shape, frequency, seconds) * envelope * rng.uniform(0.3, 0.6)
        sound[slot * length : (slot + 1) * length] += tone
    return sound.astype(np.float32)


def film(rng, things):
    """The pictures: all things in all of them, the mover further on in each."""
    picture, _ = canvas(rng)
    colors = [tint(rng, thing.body.color) for thing in things]
    frames = []
    for number in range(FRAMES):
        image = picture.copy()
        draw = ImageDraw.Draw(image)
        for thing, color in zip(things, colors, strict=True):
            draw_shape(draw, thing.at(number), color)
        frames.append(np.asarray(image))
    return np.stack(frames)


def clip(rng):
    """A clip drawn at random."""
    count = int(rng.integers(2, 4))
    colors, shapes = rng.permutation(len(COLORS))[:count], rng.permutation(len(SHAPES))[:count]
    quarters = rng.permutation(4)[:count]
    moving, sounding = int(rng.integers(count)), rng.permutation(count)
    sounding = sounding[: int(rng.integers(1, count + 1))]
    things = []
    for i, quarter in enumerate(quarters):
        size = int(rng.integers(9, 12))
        corner = (quarter % 2, quarter // 2)
        left, top = (5 + 23 * int(c) + int(rng.integers(0, 23 - size)) for c in corner)
        box = (left, top, left + size, top + size)
        body = Shape(list(COLORS)[colors[i]], SHAPES[shapes[i]], box)
        pitch = choice(rng, tuple(PITCHES)) if i in sounding else None
        things.append(Thing(body, choice(rng, tuple(WAYS)) if i == moving else None, pitch))
    notes = tuple(things[i] for i in sounding)
    frames, sound = film(rng, things), record(rng, notes)
    half = IMAGE_SIZE / 2
    ordered = sorted(things, key=lambda t: (t.body.center[1] > half, t.body.center[0]))
    return Clip(tuple(ordered), notes, frames, sound)


def told(clip, modality):
    """What a modality has to tell, in words: what the language model learns to reason with.

    All about one thing is one word, as one feature of a tower tells all about its patch or moment.
    """
    if modality == "vision":
        things = [(t.body.color, t.body.shape, t.body.place) for t in clip.things]
    elif modality == "audio":
        things = [(t.pitch, t.body.shape) for t in clip.notes]
    else:
        things = [(clip.mover.body.shape, clip.mover.way)]
    return " ".join("-".join(thing).replace(" ", "-") for thing in things)


def questions(clip):
    """All questions about a clip that have one answer: [(question, answer, kind)]."""
    asked = []
    for thing in clip.things:
        body = thing.body
        asked += [
            (f"what color is the {body.shape} ?", body.color, "color"),
            (f"what shape is {body.color} ?", body.shape, "shape"),
            (f"where is the {body.shape} ?", body.place, "place"),
        ]
    mover, first, last = clip.mover, clip.notes[0], clip.notes[-1]
    asked += [
        ("how many sounds ?", str(len(clip.notes)), "count"),
        ("what moves ?", mover.body.shape, "mover"),
        ("which way does it move ?", mover.way, "way"),
        ("does the moving thing sound ?", "yes" if mover.pitch else "no", "moving sound"),
    ]
    for word, note in (("first", first), ("last", last)):
        asked += [
            (f"how high is the {word} sound ?", note.pitch, "pitch"),
            (f"what sounds {word} ?", note.body.shape, "timbre"),
            (f"what color is the {word} sound ?", note.body.color, "color of a sound"),
            (f"where is the {word} sound ?", note.body.place, "place of a sound"),
        ]
    if mover.pitch:
        asked.append(("how high is the moving thing ?", mover.pitch, "pitch of the mover"))
    still = [note for note in clip.notes if not note.way]
    if len(still) == 1:
        asked.append(
            ("what color is the still sound ?", still[0].body.color, "color of the still sound")
        )
    return asked
