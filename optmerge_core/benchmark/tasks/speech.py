"""What is said aloud in the study of hearing, and by whom: espeak-ng in many voices.

`espeak-ng` (a Debian package) is needed to train and to draw the questions anew, not to ask those
that ship. Voices of validation and test are not in training; flite, another synthesiser, is for
tests only.
"""

import io
import shutil
import subprocess
import wave
from dataclasses import dataclass

import numpy as np
from scipy.signal import resample_poly

from optmerge_core.benchmark.models.ear import RATE
from optmerge_core.benchmark.tasks.english.lettering import allowed, words
from optmerge_core.benchmark.tasks.english.samples import TASKS, sample
from optmerge_core.benchmark.tasks.scenes import choice
from optmerge_core.errors import MissingExtra

ACCENTS = (
    "en-us",
    "en-gb",
    "en-gb-scotland",
    "en-gb-x-rp",
    "en-gb-x-gbclan",
    "en-gb-x-gbcwmd",
    "en-029",
)
VARIANTS = {
    "train": (
        *("m1", "m2", "m3", "m4", "m5", "f1", "f2", "f3", "Alex", "Andy", "Annie", "Denis"),
        *("Gene", "Jacky", "Lee", "Mario", "linda", "max", "michael", "john", "robert", "anika"),
    ),
    "validation": ("m6", "f4", "Mike", "Steph"),
    "test": ("m7", "m8", "f5", "belinda", "Diogo", "rob"),
}
"""Split -> who speaks in it: the voice's files of espeak-ng."""
SEED = 41  # of the pictures that are asked about
LISTS = ("words", "names", "goods", "months", "days")


@dataclass(frozen=True)
class Voice:
    """speed: words a minute; pitch: 0 to 99; noise: its root mean square over the speech's."""

    name: str
    speed: int
    pitch: int
    noise: float = 0.0


def voice(rng, split):
    """A voice of a split, at a speed, pitch and loudness of noise of chance."""
    return Voice(
        f"{choice(rng, ACCENTS)}+{choice(rng, VARIANTS[split])}",
        int(rng.integers(130, 191)),
        int(rng.integers(30, 71)),
        float(10 ** rng.uniform(-2.5, -0.8)),
    )


def say(rng, text, voice):
    """A text spoken by a voice: float32 samples at RATE, between -1 and 1.

    Raises `MissingExtra` where espeak-ng is not installed.
    """
    if shutil.which("espeak-ng") is None:
        raise MissingExtra(
            "this lets espeak-ng speak, which is not installed: apt-get install espeak-ng",
            name="espeak-ng",
        )
    command = ["espeak-ng", "--stdout", "-v", voice.name, "-s", voice.speed, "-p", voice.pitch]
    spoken = subprocess.run([*map(str, command), "--", text], capture_output=True, check=True)
    sound = read_wave(io.BytesIO(spoken.stdout))
    loudness = np.sqrt(np.mean(sound**2))
    noisy = sound + voice.noise * loudness * rng.standard_normal(len(sound))
    return (noisy / max(1.0, np.abs(noisy).max())).astype(np.float32)


def read_wave(file):
    """A WAV file of 16 bits, of any rate, channels averaged: float samples at RATE."""
    with wave.open(file) as recording:
        if recording.getsampwidth() != 2:
            raise ValueError(f"{file} has {8 * recording.getsampwidth()} bits; give 16-bit WAV")
        channels, rate = recording.getnchannels(), recording.getframerate()
        # A stream's header may promise more frames than come.
        content = recording.readframes(recording.getnframes())
    sound = np.frombuffer(content[: len(content) // 2 * 2], "<i2").astype(float) / 2**15
    return resample_poly(sound.reshape(-1, channels).mean(1), RATE, rate)


def text(rng, split):
    """Something to say: a question about a picture, or two to five words of a list."""
    if rng.random() < 0.7:
        drawn = sample(choice(rng, TASKS), split, int(rng.integers(2**31)), seed=SEED)
        return choice(rng, drawn.turns).question
    group = words(choice(rng, LISTS))
    return " ".join(
        allowed(rng, split, lambda: choice(rng, group), "word")
        for _ in range(int(rng.integers(2, 6)))
    )
