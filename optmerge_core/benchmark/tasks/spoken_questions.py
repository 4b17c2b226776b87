"""The spoken questions about pictures that ship: what the composed model of `smol_omni` is asked.

A row has the picture, what a voice says about it, and the same in writing; of the sound it has the
spectrogram in 256 steps, which is what Whisper is given. A dozen recordings lie beside the rows, to
be listened to.
"""

import io
import wave
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image

from optmerge_core.benchmark.models.ear import FRAMES, RATE, spectrograms
from optmerge_core.benchmark.tasks.english.datasets import encoded
from optmerge_core.benchmark.tasks.english.telling import Asked, Shown, shown
from optmerge_core.benchmark.tasks.samples import SPLITS, image_hash
from optmerge_core.benchmark.tasks.scenes import choice
from optmerge_core.benchmark.tasks.speech import say, voice
from optmerge_core.benchmark.tasks.spoken import Exchange, unheard

KINDS = ("name", "place", "color", "count", "exists", "relation", "fact", "named", "read")
COUNTS = {"validation": 10, "test": 40}
"""Split -> questions of each kind, each about a picture of its own."""
LONGEST = 2  # windows of speech
SEED = 44
CLIPS = 12  # recordings that are written as files
LOW, STEPS = -1.5, 85  # a spectrogram's byte b is LOW + b / STEPS
TEXTS = ("told", "heard", "written", "answer", "kind", "skill", "hash", "voice")
FEATURES = datasets.Features(
    {"image": datasets.Image(), "spectrogram": datasets.Image()}
    | {name: datasets.Value("string") for name in TEXTS}
    | {name: datasets.Value("bool") for name in ("held_out", "unheard")}
    | {"number": datasets.Value("int32")}
)


def kind_of(skill, asked):
    """One of KINDS: all that is read is one, and so is what takes knowledge of what is seen."""
    if skill == "text":
        return "read"
    return "fact" if asked.kind in ("which", "use", "is") else asked.kind


def packed(heard):
    """Spectrograms (windows, 80, t), float32 -> uint8 (80, windows * t)."""
    steps = ((heard - LOW) * STEPS).round().clip(0, 255).to(torch.uint8)
    return torch.cat(list(steps), dim=1).numpy()


def unpacked(pixels):
    """The inverse, to half a step: (windows, 80, t) float32."""
    heard = LOW + torch.from_numpy(np.array(pixels)).float() / STEPS
    return torch.stack(heard.split(2 * FRAMES, dim=1))


def drawn(split, count):
    """Rows of `count` questions of each kind, in the order of KINDS; each with its `sound`."""
    found = {kind: [] for kind in KINDS}
    number = 0
    while any(len(rows) < count for rows in found.values()):
        skill = "text" if number % 4 == 3 else "scene"
        picture = shown(skill, split, number, SEED)
        rng = np.random.default_rng([SEED, 35, list(SPLITS).index(split), number])
        wanted = [a for a in picture.asked if len(found[kind_of(skill, a)]) < count]
        wanted = [a for a in wanted if split == "test" or not unheard(a.heard)]
        if wanted and (row := spoken(rng, split, picture, choice(rng, wanted))):
            row |= {"skill": skill, "kind": kind_of(skill, row.pop("asked")), "number": number}
            found[row["kind"]].append(row)
        number += 1
    return [row for rows in found.values() for row in rows]


def spoken(rng, split, picture, asked):
    """A row of what a voice of the split says; None where that takes more than LONGEST windows."""
    speaker = voice(rng, split)
    sound = say(rng, asked.heard, speaker)
    heard = spectrograms([sound])
    if len(heard) > LONGEST:
        return None
    return {
        "asked": asked, "sound": sound, "told": picture.told, "heard": asked.heard,
        "written": asked.written, "answer": asked.answer, "held_out": asked.held_out,
        "unheard": unheard(asked.heard), "hash": image_hash(picture.image),
        "image": encoded(picture.image), "spectrogram": encoded(packed(heard)),
        "voice": f"{speaker.name}, {speaker.speed} words a minute, pitch {speaker.pitch}",
    }  # fmt: skip


def write_splits(folder):
    """Write <folder>/<split>.parquet for validation and test, and CLIPS recordings of the latter.

    Needs espeak-ng.
    """
    Path(folder, "clips").mkdir(parents=True, exist_ok=True)
    for split, count in COUNTS.items():
        rows = drawn(split, count)
        for place in range(0, len(rows), -(-len(rows) // CLIPS)) if split == "test" else ():
            write_wave(Path(folder, "clips", f"{place:03d}.wav"), rows[place]["sound"])
        kept = [{key: row[key] for key in FEATURES} for row in rows]
        table = datasets.Dataset.from_list(kept, features=FEATURES).data.table
        pq.write_table(table, Path(folder, f"{split}.parquet"))


def write_wave(path, sound):
    """Samples at RATE between -1 and 1 as a WAV file of 16 bits."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes((sound * (2**15 - 1)).astype("<i2").tobytes())


def load(folder, split, count=None):
    """The rows of a split, of each kind the first `count`, with their pictures as arrays.

    A row has beside its columns `exchange`, and `heard_as` (windows, 80, t).
    """
    rows, taken = [], dict.fromkeys(KINDS, 0)
    for row in pq.read_table(Path(folder, f"{split}.parquet")).to_pylist():
        taken[row["kind"]] += 1
        if count is None or taken[row["kind"]] <= count:
            rows.append(opened(row))
    return rows


def opened(row):
    image, sound = (
        np.array(Image.open(io.BytesIO(row[name]["bytes"])).convert(mode))
        for name, mode in (("image", "RGB"), ("spectrogram", "L"))
    )
    asked = Asked(row["heard"], row["answer"], row["kind"], row["held_out"], row["written"])
    exchange = Exchange(row["skill"], Shown(image, row["told"], [asked]), asked)
    return row | {"exchange": exchange, "heard_as": unpacked(sound)}
