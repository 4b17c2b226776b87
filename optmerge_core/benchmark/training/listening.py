"""Spoken exchanges as Whisper's frozen encoder hears them: computed once, kept in files.

A file has SHARD exchanges: <number>.safetensors the stacked frames, <number>.json all that was said
and written. A file that is there is not made again, so listening goes on where it stopped.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from optmerge_core.benchmark.models.ear import TOKENS, spectrograms
from optmerge_core.benchmark.tasks.english.telling import Asked, Shown
from optmerge_core.benchmark.tasks.samples import SPLITS
from optmerge_core.benchmark.tasks.speech import say, voice
from optmerge_core.benchmark.tasks.spoken import Exchange, exchange, unheard

SHARD = 250  # exchanges in a file
WINDOWS = 2  # of sound in one exchange at most
SPOKEN = {"scene": 4.0, "text": 1.5, "knowledge": 2.0, "write": 2.0, "spell": 0.7, "repeat": 0.8}
"""Skill -> how often it is spoken; most are questions about descriptions, as composing needs."""


@dataclass(frozen=True)
class Clip:
    """An exchange whose voice is heard: frames (windows * TOKENS, 1536) float16, four a row."""

    exchange: Exchange
    frames: torch.Tensor


def spoken_exchange(split, number, seed):
    """Exchange number `number` and its windows' spectrograms, or None where it is not for training.

    Left out is what is longer than WINDOWS windows, and in training and validation what names a
    thing that no voice names there.
    """
    rng = np.random.default_rng([seed, 33, list(SPLITS).index(split), number])
    shares = np.array(list(SPOKEN.values()))
    skill = list(SPOKEN)[rng.choice(len(shares), p=shares / shares.sum())]
    drawn = exchange(skill, split, number, seed=seed)
    if split != "test" and unheard(drawn.asked.heard):
        return None
    heard = spectrograms([say(rng, drawn.asked.heard, voice(rng, split))])
    return (drawn, heard) if len(heard) <= WINDOWS else None


@torch.inference_mode()
def listen(folder, tower, split, count, seed):
    """Files in `folder` of the first `count` numbers of a split, as `tower` hears them."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    bar = tqdm(range(0, count, SHARD), desc=f"listening ({split})", mininterval=5)
    for start in bar:
        path = folder / f"{start // SHARD:04d}.safetensors"
        if path.exists():
            continue
        frames, rows = [], []
        for number in range(start, min(start + SHARD, count)):
            if found := spoken_exchange(split, number, seed):
                drawn, heard = found
                states = tower(heard.to(tower.dtype)).last_hidden_state
                frames.append(states.reshape(len(heard) * TOKENS, -1).half())
                rows.append(_written(drawn, len(heard)))
        path.with_suffix(".json").write_text(json.dumps(rows, indent=0), encoding="utf-8")
        partial = path.with_suffix(".partial")
        save_file({"frames": torch.cat(frames)}, partial)
        partial.replace(path)  # last: with it the file counts as made


def _written(drawn, windows):
    told = drawn.shown.told if drawn.shown else None
    return {"skill": drawn.skill, "told": told, "windows": windows} | vars(drawn.asked)


class Clips:
    """What `listen` kept in a folder, by skill; `draw` is what `batches` takes."""

    def __init__(self, folder):
        self.clips = {}
        for path in sorted(Path(folder).glob("*.safetensors")):
            frames = load_file(path)["frames"]
            rows = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            sizes = [row.pop("windows") * TOKENS for row in rows]
            for row, heard in zip(rows, frames.split(sizes), strict=True):
                skill, told = row.pop("skill"), row.pop("told")
                shown = Shown(None, told, []) if told else None
                clip = Clip(Exchange(skill, shown, Asked(**row)), heard)
                self.clips.setdefault(skill, []).append(clip)

    def __len__(self):
        return sum(map(len, self.clips.values()))

    def draw(self, skill, split, index, level, seed):
        """A clip of a skill by chance, which index and seed decide."""
        clips = self.clips[skill]
        return clips[np.random.default_rng([seed, 34, index]).integers(len(clips))]
