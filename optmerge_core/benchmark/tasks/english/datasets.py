"""The questions of the study `smol` that ship: two of each picture's turns."""

import io
from collections import Counter
from pathlib import Path

import datasets
import pyarrow.parquet as pq
from PIL import Image

from optmerge_core.benchmark.tasks.english.drawing import UNITS
from optmerge_core.benchmark.tasks.english.samples import TASKS, sample
from optmerge_core.benchmark.tasks.samples import image_hash

COUNTS = {"validation": 100, "test": 300}
"""Split -> questions of each task."""
ABOUT = 2  # questions about one picture
BLIND = {"VQA": 0.4}
"""Task -> share of its pictures of which words alone answer a question; others have what comes."""
FEATURES = datasets.Features(
    {"image": datasets.Image()}
    | {name: datasets.Value("string") for name in ("question", "answer", "kind", "task", "hash")}
    | {name: datasets.Value("bool") for name in ("blind", "held_out")}
    | {"number": datasets.Value("int32")}
)


def chosen(turns, asked):
    """ABOUT of a picture's turns, those first of the sort that was asked least before.

    What words alone answer goes before all others. No two are of a kind, and no two answers have a
    word in common, as they would ask for the same fact; so there may be fewer. asked: Counter of
    (kind, blind, held_out).
    """
    left, taken = list(turns), []
    while left and len(taken) < ABOUT:
        turn = min(left, key=lambda turn: (not turn.blind, asked[turn[2:]]))
        taken.append(turn)
        told = set(turn.answer.split())
        left = [t for t in left if t.kind != turn.kind and not told & set(t.answer.split())]
    return taken


def drawn(task, split, count):
    """(number, Sample, its turns) of pictures with `count` questions together, in their order.

    A sample is left out if it has too few turns, or too few of its task so far are blind.
    """
    asked, number, blind, seeing = Counter(), 0, 0, 0
    share = BLIND.get(task, 0)
    while asked.total() < count:
        picture = sample(task, split, number)
        turns = chosen(picture.turns, asked)
        told = any(turn.blind for turn in turns)
        if len(turns) == ABOUT and (told or seeing * share <= blind * (1 - share)):
            asked.update(turn[2:] for turn in turns)
            blind, seeing = blind + told, seeing + (not told)
            yield number, picture, turns
        number += 1


def encoded(pixels):
    """A picture as a WebP file without loss, which is smaller than a PNG."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "WEBP", lossless=True)
    return {"bytes": file.getvalue()}


def make_dataset(task, split, count):
    """A `datasets.Dataset` of `count` questions, the two of a picture one after the other.

    Columns: image, question, answer, kind, task and hash, as the other studies have them; blind and
    held_out, as `Turn` says; the number of the sample in its split; of boxes box_unit.
    """
    rows = []
    for number, picture, turns in drawn(task, split, count):
        shown = {"image": encoded(picture.image), "hash": image_hash(picture.image)}
        shown |= {"task": task, "number": number}
        rows += [turn._asdict() | shown for turn in turns]
    features = datasets.Features(FEATURES)
    if task == "Grounding":
        features["box_unit"] = datasets.Value("int32")
        rows = [row | {"box_unit": UNITS} for row in rows]
    return datasets.Dataset.from_list(rows, features=features)


def write_splits(folder):
    """Write <folder>/<split>/<task>.parquet for every split and task: what the package ships.

    A picture is stored once, in its column's dictionary, which is let grow beyond 1 MiB for it.
    """
    for split, count in COUNTS.items():
        Path(folder, split).mkdir(parents=True, exist_ok=True)
        for task in TASKS:
            table = make_dataset(task, split, count).data.table
            path = Path(folder, split, f"{task}.parquet")
            pq.write_table(table, path, dictionary_pagesize_limit=2**26)
