"""Samples and splits of the five tasks in English."""

from dataclasses import dataclass
from functools import cache
from importlib import import_module

import numpy as np

from optmerge_core.benchmark.tasks import samples
from optmerge_core.benchmark.tasks.samples import SPLITS, image_hash

DRAW = {
    "VQA": "scenes:vqa",
    "Geometry": "geometry:geometry",
    "Chart": "charts:chart",
    "OCR": "writing:ocr",
    "Grounding": "scenes:grounding",
}
"""Task -> its module and function here."""
TASKS = tuple(DRAW)


@dataclass(frozen=True)
class Sample(samples.Sample):
    """A picture, uint8 (112, 112, 3), the turns about it, what its cells show: see `Drawing`."""

    cells: dict[tuple[int, int], list[str]]
    boxes: dict[tuple[int, int], tuple[int, int, int, int]]


@cache
def draw(task):
    """The function that draws a task's pictures."""
    module, name = DRAW[task].split(":")
    return getattr(import_module(f"optmerge_core.benchmark.tasks.english.{module}"), name)


def sample(task, split, index, level="full", seed=0):
    """Sample number `index` of a split; the same arguments give the same sample everywhere.

    As in `tasks/samples.py`: splits differ in their random stream and in their pictures, whose hash
    says to which split they may belong.
    """
    rng = np.random.default_rng([seed, list(SPLITS).index(split), 100 + TASKS.index(task), index])
    while True:
        drawing = draw(task)(rng, split, level)
        pixels = np.asarray(drawing.image)
        if int(image_hash(pixels), 16) % 10 in SPLITS[split]:
            return Sample(pixels, drawing.turns, drawing.cells, drawing.boxes)
