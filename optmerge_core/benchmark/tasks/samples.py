"""Samples, splits and data sets of the five capabilities.

The counterparts of the paper's Table 1: VQA, Geometry, Chart, OCR, Grounding. A sample is an image
that the package draws itself (`scenes.py`, `diagrams.py`), a question and a short answer; samples
for training ask further questions about the same image, as a conversation. `combined.py` draws
questions that no model is trained on.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from optmerge_core.benchmark.tasks.combined import COMBINED
from optmerge_core.benchmark.tasks.diagrams import chart, geometry, ocr
from optmerge_core.benchmark.tasks.scenes import grounding, vqa

DRAW = {"VQA": vqa, "Geometry": geometry, "Chart": chart, "OCR": ocr, "Grounding": grounding}
TASKS = tuple(DRAW)
DRAW |= COMBINED
SPLITS = {"train": range(2, 10), "validation": range(1, 2), "test": range(0, 1)}


@dataclass(frozen=True)
class Sample:
    """An image, uint8 (56, 56, 3), and turns (question, answer, kind = the sub-task) about it."""

    image: np.ndarray
    turns: list[tuple[str, str, str]]

    @property
    def question(self):
        return self.turns[0][0]

    @property
    def answer(self):
        return self.turns[0][1]

    @property
    def kind(self):
        return self.turns[0][2]


def image_hash(image):
    """A content hash of the pixels: what decides the split, so no image is in two splits."""
    return hashlib.blake2b(np.ascontiguousarray(image).tobytes(), digest_size=8).hexdigest()


def sample(task, split, index, level="full", seed=0):
    """Sample number `index` of a split; the same arguments give the same sample everywhere.

    Splits differ in their random stream and, whatever the stream draws, in their images: the hash
    of the pixels modulo 10 says which split an image may belong to (test 0, validation 1).
    """
    stream = list(SPLITS).index(split)
    rng = np.random.default_rng([seed, stream, list(DRAW).index(task), index])
    while True:
        image, turns = DRAW[task](rng, level)
        pixels = np.asarray(image)
        if int(image_hash(pixels), 16) % 10 in SPLITS[split]:
            return Sample(pixels, turns)


def make_dataset(task, split, count, level="full", seed=0):
    """A `datasets.Dataset` of `count` samples: image, question, answer, kind, task, hash."""
    rows = [sample(task, split, i, level, seed) for i in range(count)]
    features = datasets.Features(
        {k: datasets.Value("string") for k in ("question", "answer", "kind", "task", "hash")}
        | {"image": datasets.Image()}
    )
    columns = {
        "question": [r.question for r in rows],
        "answer": [r.answer for r in rows],
        "kind": [r.kind for r in rows],
        "task": [task] * count,
        "hash": [image_hash(r.image) for r in rows],
        "image": [Image.fromarray(r.image) for r in rows],
    }
    return datasets.Dataset.from_dict(columns, features=features)


def write_splits(folder):
    """Write <folder>/<split>/<task>.parquet for every split and task: what the package ships."""
    shipped = ("validation", TASKS, 300), ("test", TASKS, 1500), ("test", tuple(COMBINED), 500)
    for split, tasks, count in shipped:
        Path(folder, split).mkdir(parents=True, exist_ok=True)
        for task in tasks:
            make_dataset(task, split, count).to_parquet(str(Path(folder, split, f"{task}.parquet")))
