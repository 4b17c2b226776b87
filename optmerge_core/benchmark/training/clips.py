"""Clips as training data of the Omni benchmark: described, perceived, or labelled."""

from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from optmerge_core.benchmark.models.omni import (
    FEATURES,
    MODALITIES,
    PATCH,
    PATCHES,
    answerable,
    describe,
    in_words,
    modality_inputs,
    prompt,
)
from optmerge_core.benchmark.tasks.clips import (
    FRAMES,
    NEEDS,
    NOTES,
    PITCHES,
    RATE,
    SHAPES,
    WAYS,
    clip,
    questions,
)
from optmerge_core.benchmark.tasks.scenes import COLORS, IMAGE_SIZE

CLASSES = {  # what the towers tell apart
    "color": list(COLORS),
    "shape": list(SHAPES),
    "place": [f"{v} {h}" for v in ("top", "bottom") for h in ("left", "right")],
    "way": list(WAYS),
    "pitch": list(PITCHES),
}
HEADS = {  # and what each of them says of a feature
    "vision": ("color", "shape", "place"),
    "audio": ("shape", "pitch"),
    "video": ("shape", "way"),
}
CAPTION = "describe the clip"
TURNS = 6  # questions about one clip at most, one after the other


class Clips(Dataset):
    """Training clip number i, the same for every model that is given this seed."""

    def __init__(self, count, seed):
        self.count, self.seed = count, seed

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        rng = np.random.default_rng([self.seed, 11, index])
        return clip(rng), rng


def conversation(item, rng, modalities, own=None, least=1):
    """One to TURNS (question, answer) that these modalities answer, kinds drawn evenly.

    own: the modality that every question must need; least: how many of them it must need.
    """
    asked = [
        question
        for question in questions(item)
        if answerable(question[2], modalities)
        and len(NEEDS[question[2]]) >= least
        and (own is None or own in NEEDS[question[2]])
    ]
    kinds = sorted({kind for _, _, kind in asked})
    turns = [(CAPTION, describe(item, modalities))] if rng.random() < 0.2 else []
    for kind in rng.permutation(kinds)[: int(rng.integers(1, TURNS + 1))]:
        same = [q for q in asked if q[2] == kind]
        turns.append(same[int(rng.integers(len(same)))][:2])
    return [turns[i] for i in rng.permutation(len(turns))]


def text_batch(tokenizer, rows):
    """Conversations, lists of (prompt, answer) -> input_ids and labels (b, t), padded right."""
    sequences = []
    for row in rows:
        ids, labels = [], []
        for text, answer in row:
            asked = tokenizer(text)["input_ids"]
            said = [*tokenizer(f" {answer}")["input_ids"], tokenizer.eos_token_id]
            ids += asked + said
            labels += [-100] * len(asked) + said
        sequences.append((ids, labels))
    width = max(len(ids) for ids, _ in sequences)
    ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    labels = torch.full((len(rows), width), -100)
    for i, (own, wanted) in enumerate(sequences):
        ids[i, : len(own)] = torch.tensor(own)
        labels[i, : len(own)] = torch.tensor(wanted)
    return {"input_ids": ids, "labels": labels}


def prompts(turns, modalities=(), words=None):
    """The turns as (prompt, answer); what there is to see or hear stands in the first."""
    first = [(prompt(turns[0][0], modalities, words), turns[0][1])]
    return first + [(prompt(question), answer) for question, answer in turns[1:]]


@dataclass(frozen=True)
class Described:
    """Clips to text: each modality in words with its probability, questions they answer.

    least: how many modalities each question needs at least (`shares` must then give them).
    """

    tokenizer: object
    shares: tuple = (0.6, 0.6, 0.6)
    least: int = 1

    def __call__(self, samples):
        rows = []
        for item, rng in samples:
            chosen = zip(MODALITIES, self.shares, strict=True)
            given = [m for m, share in chosen if rng.random() < share]
            given = given or [MODALITIES[int(rng.integers(3))]]
            turns = conversation(item, rng, given, least=self.least)
            rows.append(prompts(turns, words=in_words(item, given)))
        return text_batch(self.tokenizer, rows)


@dataclass(frozen=True)
class Perceived:
    """Clips to one modality's inputs and questions that need it.

    told: with this probability each of the other modalities is described in words, so that
    questions that need several can be asked although no other input is given.
    """

    modality: str
    tokenizer: object
    images: object
    sounds: object
    told: float = 0.5

    def __call__(self, samples):
        own, rows = self.modality, []
        for item, rng in samples:
            told = [m for m in MODALITIES if m != own and rng.random() < self.told]
            turns = conversation(item, rng, [own, *told], own)
            rows.append(prompts(turns, [own], in_words(item, told)))
        clips = [item for item, _ in samples]
        inputs = modality_inputs(clips, [own], self.images, self.sounds)[own]
        batch = text_batch(self.tokenizer, rows)
        mask = torch.ones_like(batch["input_ids"])
        return batch | {"attention_mask": mask} | inputs


def patch_labels(item, kind):
    """What each patch shows, 0 for nothing: head -> class (PATCHES,).

    vision: colour, shape and place of the things in the still picture; video: shape and way of the
    one that moves, where it is in the middle of the clip.
    """
    labels = {head: np.zeros(PATCHES, dtype=np.int64) for head in HEADS[kind]}
    side = IMAGE_SIZE // PATCH
    for thing in item.things if kind == "vision" else [item.mover]:
        body = thing.at(FRAMES // 2) if kind == "vision" else thing.body
        column, row = (int(np.clip(v // PATCH, 0, side - 1)) for v in body.center)
        found = {"color": body.color, "shape": body.shape, "place": body.place, "way": thing.way}
        for head in labels:
            labels[head][row * side + column] = 1 + CLASSES[head].index(found[head])
    return labels


def moment_labels(item):
    """Shape (its timbre) and pitch in each of the audio tower's moments, 0 for silence: (25,)."""
    moments = FEATURES["audio"]
    form, pitch = (np.zeros(moments, dtype=np.int64) for _ in range(2))
    length = RATE // NOTES
    slots = [i for i in range(NOTES) if item.sound[i * length : (i + 1) * length].std() > 0.05]
    for slot, note in zip(slots, item.notes, strict=True):
        inside = slice(round(slot * moments / NOTES), round((slot + 1) * moments / NOTES))
        form[inside] = 1 + SHAPES.index(note.body.shape)
        pitch[inside] = 1 + list(PITCHES).index(note.pitch)
    return {"shape": form, "pitch": pitch}


@dataclass(frozen=True)
class Labelled:
    """Clips to a tower's inputs and the labels of its features."""

    kind: str
    images: object
    sounds: object

    def __call__(self, samples):
        clips = [item for item, _ in samples]
        inputs = modality_inputs(clips, [self.kind], self.images, self.sounds)[self.kind]
        if self.kind == "audio":
            inputs = {"input_features": inputs["input_features"]}
            labels = [moment_labels(item) for item in clips]
        else:
            labels = [patch_labels(item, self.kind) for item in clips]
        if self.kind == "video":  # one change of each clip is enough
            numbers = torch.tensor([int(rng.integers(FRAMES - 1)) for _, rng in samples])
            every = inputs["pixel_values_videos"]
            inputs = {"pixel_values": every[torch.arange(len(clips)), numbers]}
        stacked = {
            head: torch.tensor(np.stack([own[head] for own in labels])) for head in labels[0]
        }
        return {"inputs": inputs, "labels": stacked}


def loader(collate, steps, seed, batch, workers):
    return DataLoader(
        Clips(steps * batch, seed),
        batch_size=batch,
        collate_fn=collate,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,
    )
