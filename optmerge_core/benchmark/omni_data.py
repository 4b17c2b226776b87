"""Clips as training data of the Omni benchmark: described, perceived, or labelled."""

from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from .clips import FRAMES, NOTES, PITCHES, RATE, SHAPES, clip, questions
from .omni_models import (
    FEATURES,
    MODALITIES,
    PATCH,
    PATCHES,
    answerable,
    describe,
    modality_inputs,
    prompt,
)
from .scenes import COLORS, IMAGE_SIZE

CAPTION = "describe the clip"


class Clips(Dataset):
    """Training clip number i, the same for every model that is given this seed."""

    def __init__(self, count, seed):
        self.count, self.seed = count, seed

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        rng = np.random.default_rng([self.seed, 11, index])
        return clip(rng), rng


def turn(item, rng, modalities):
    """A question that these modalities answer, kinds drawn evenly; a caption now and then."""
    if rng.random() < 0.2:
        return CAPTION, describe(item, modalities)
    asked = [q for q in questions(item) if answerable(q[2], modalities)]
    kinds = sorted({kind for _, _, kind in asked})
    kind = kinds[int(rng.integers(len(kinds)))]
    asked = [q for q in asked if q[2] == kind]
    return asked[int(rng.integers(len(asked)))][:2]


def text_batch(tokenizer, rows):
    """(prompt, answer) pairs -> input_ids and labels (b, t), padded right."""
    pairs = [
        (tokenizer(p)["input_ids"], tokenizer(f" {a}")["input_ids"] + [tokenizer.eos_token_id])
        for p, a in rows
    ]
    width = max(len(p) + len(a) for p, a in pairs)
    ids = torch.full((len(pairs), width), tokenizer.pad_token_id)
    labels = torch.full((len(pairs), width), -100)
    for i, (p, a) in enumerate(pairs):
        ids[i, : len(p) + len(a)] = torch.tensor(p + a)
        labels[i, len(p) : len(p) + len(a)] = torch.tensor(a)
    return {"input_ids": ids, "labels": labels}


@dataclass(frozen=True)
class Described:
    """Clips to text: some modalities in words, a question they answer."""

    tokenizer: object

    def __call__(self, samples):
        rows = []
        for item, rng in samples:
            given = [m for m in MODALITIES if rng.random() < 0.6]
            given = given or [MODALITIES[int(rng.integers(3))]]
            question, answer = turn(item, rng, given)
            rows.append((prompt(question, description=describe(item, given)), answer))
        return text_batch(self.tokenizer, rows)


@dataclass(frozen=True)
class Perceived:
    """Clips to one modality's inputs and a question that it alone answers."""

    modality: str
    tokenizer: object
    images: object
    sounds: object

    def __call__(self, samples):
        rows = []
        for item, rng in samples:
            question, answer = turn(item, rng, [self.modality])
            rows.append((prompt(question, [self.modality]), answer))
        clips = [item for item, _ in samples]
        inputs = modality_inputs(clips, [self.modality], self.images, self.sounds)[self.modality]
        batch = text_batch(self.tokenizer, rows)
        mask = torch.ones_like(batch["input_ids"])
        return batch | {"attention_mask": mask} | inputs


def patch_labels(shapes):
    """What lies in each patch: colour and shape (PATCHES,) with 0 for nothing, offset (…, 2)."""
    color, form = (np.zeros(PATCHES, dtype=np.int64) for _ in range(2))
    offset = np.zeros((PATCHES, 2), dtype=np.float32)
    side = IMAGE_SIZE // PATCH
    for body in shapes:
        x, y = body.center
        column, row = (int(np.clip(v // PATCH, 0, side - 1)) for v in (x, y))
        place = row * side + column
        color[place] = 1 + list(COLORS).index(body.color)
        form[place] = 1 + SHAPES.index(body.shape)
        offset[place] = [x / PATCH - column - 0.5, y / PATCH - row - 0.5]
    return color, form, offset


def moment_labels(item):
    """Timbre and pitch of each of the audio tower's moments, 0 for silence: (25,) each."""
    moments = FEATURES["audio"]
    form, pitch = (np.zeros(moments, dtype=np.int64) for _ in range(2))
    length = RATE // NOTES
    slots = [i for i in range(NOTES) if item.sound[i * length : (i + 1) * length].std() > 0.05]
    for slot, note in zip(slots, item.notes, strict=True):
        inside = slice(round(slot * moments / NOTES), round((slot + 1) * moments / NOTES))
        form[inside] = 1 + SHAPES.index(note.body.shape)
        pitch[inside] = 1 + list(PITCHES).index(note.pitch)
    return form, pitch


def stacked(arrays):
    return torch.from_numpy(np.stack(arrays))


@dataclass(frozen=True)
class Labelled:
    """Clips to a tower's inputs and the labels of its features."""

    kind: str
    images: object
    sounds: object

    def __call__(self, samples):
        clips = [item for item, _ in samples]
        if self.kind == "audio":
            found = modality_inputs(clips, ["audio"], self.images, self.sounds)["audio"]
            labels = zip(*map(moment_labels, clips), strict=True)
            names = ("timbre", "pitch")
            return {
                "inputs": {"input_features": found["input_features"]},
                "labels": {
                    n: torch.tensor(np.stack(x)) for n, x in zip(names, labels, strict=True)
                },
            }
        numbers = [int(rng.integers(FRAMES)) for _, rng in samples]
        pixels = self.images(
            [c.frames[n] for c, n in zip(clips, numbers, strict=True)], return_tensors="pt"
        )
        color, form, offset = zip(
            *(
                patch_labels([t.at(n) for t in c.things])
                for c, n in zip(clips, numbers, strict=True)
            ),
            strict=True,
        )
        return {
            "inputs": dict(pixels),
            "labels": {
                "color": torch.tensor(np.stack(color)),
                "shape": torch.tensor(np.stack(form)),
            },
            "offset": torch.tensor(np.stack(offset)),
        }


def loader(collate, steps, seed, batch, workers):
    return DataLoader(
        Clips(steps * batch, seed),
        batch_size=batch,
        collate_fn=collate,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,
    )
