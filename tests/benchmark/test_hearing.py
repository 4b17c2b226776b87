"""The ear of the study of hearing: its windows, its voices, and how its projector learns words."""

import io
import itertools
import json
import wave
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from optmerge_core.benchmark.models import ear, whisper
from optmerge_core.benchmark.models.smol import build_tokenizer
from optmerge_core.benchmark.tasks import speech
from optmerge_core.benchmark.training import hearing
from optmerge_core.errors import MissingExtra

SOUND = Path(__file__).parents[1] / "sounds" / "birds.wav"


@pytest.fixture(scope="module")
def small():
    """The ear before a small language model, which takes no seconds to load."""
    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=24, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=4,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ear, "language_model", lambda: LlamaForCausalLM(config))
        return ear.build_ear(tokenizer), tokenizer


def test_windows_are_whole_and_the_last_is_filled_with_silence():
    sound = np.arange(1.0, ear.RATE * ear.WINDOW + 3)
    found = ear.windows(sound)
    assert found.shape == (2, ear.RATE * ear.WINDOW)
    assert np.array_equal(found.ravel()[: len(sound)], sound) and not found[1, 2:].any()
    assert len(ear.windows(sound[:-2])) == 1
    for wrong in (np.zeros((2, 5)), np.zeros(0)):
        with pytest.raises(ValueError, match=r"a recording of shape \(.*give samples of one"):
            ear.windows(wrong)


def test_the_ear_is_whisper_s_with_fewer_positions(small):
    """Whisper given as much silence as it wants hears the first window's frames much alike."""
    model, tokenizer = small
    with open(SOUND, "rb") as file:
        sound = speech.read_wave(file)
    heard = ear.spectrograms([sound, np.tile(sound, 3)])
    assert heard.shape == (1 + -(-3 * len(sound) // (ear.RATE * ear.WINDOW)), 80, 2 * ear.FRAMES)
    tower = model.model.audio_tower
    theirs = whisper.whisper().model.encoder
    for name, tensor in theirs.state_dict().items():
        mine = tower.state_dict()[name]
        assert torch.equal(mine, tensor[: len(mine)])
    with torch.inference_mode():
        padded = torch.nn.functional.pad(heard[:1], (0, 3000 - 2 * ear.FRAMES), value=-1.0)
        one, other = tower(heard[:1]).last_hidden_state, theirs(padded).last_hidden_state
        spoken = int(50 * len(sound) / ear.RATE)
        cosine = torch.cosine_similarity(one[0, :spoken], other[0, :spoken], dim=-1)
        assert cosine.mean() > 0.8
        tokens = torch.full((1, ear.TOKENS), model.config.audio_token_id)
        said = model(input_ids=tokens, input_features=heard[:1])
    assert said.logits.shape == (1, ear.TOKENS, len(tokenizer))
    assert tokenizer.decode(tokens[0, :1]) == "[AUDIO]"


def test_voices_of_the_splits_are_different_people():
    for one, other in itertools.combinations(speech.VARIANTS.values(), 2):
        assert not {v.lower() for v in one} & {v.lower() for v in other}
    voices = [speech.voice(np.random.default_rng(i), "test") for i in range(40)]
    assert {v.name.split("+")[1] for v in voices} <= set(speech.VARIANTS["test"])
    assert {v.name.split("+")[0] for v in voices} == set(speech.ACCENTS)


def test_what_is_said_comes_from_the_split():
    texts = [speech.text(np.random.default_rng(i), "train") for i in range(30)]
    assert len(set(texts)) > 25 and any(text.endswith("?") for text in texts)
    assert texts[:5] == [speech.text(np.random.default_rng(i), "train") for i in range(5)]


def wav(samples, rate=22050, channels=1, width=2):
    file = io.BytesIO()
    with wave.open(file, "wb") as recording:
        recording.setnchannels(channels)
        recording.setsampwidth(width)
        recording.setframerate(rate)
        recording.writeframes(samples)
    file.seek(0)
    return file


def test_a_recording_of_any_rate_is_read_at_the_ear_s():
    time = np.arange(22050) / 22050
    tone = np.stack([np.sin(2 * np.pi * 440 * time), np.zeros(22050)], axis=1)
    sound = speech.read_wave(wav((tone * 2**14).astype("<i2").tobytes(), channels=2))
    assert len(sound) == ear.RATE
    expected = np.sin(2 * np.pi * 440 * np.arange(ear.RATE) / ear.RATE) / 4
    assert sound[400:-400] == pytest.approx(expected[400:-400], abs=2e-3)
    with pytest.raises(ValueError, match="has 8 bits; give 16-bit WAV"):
        speech.read_wave(wav(b"1234", width=1))


def test_a_voice_speaks_with_noise_of_chance(monkeypatch):
    def run(command, **_):
        asked.append(command)
        samples = (np.sin(np.arange(22050)) * 2**14).astype("<i2").tobytes()
        return SimpleNamespace(stdout=wav(samples).read())

    asked = []
    monkeypatch.setattr(speech.subprocess, "run", run)
    monkeypatch.setattr(speech.shutil, "which", lambda name: name)
    quiet, noisy = (speech.Voice("en-us+m7", 150, 40, noise) for noise in (0.0, 0.1))
    clean = speech.say(np.random.default_rng(0), "-v is no option", quiet)
    heard = speech.say(np.random.default_rng(0), "-v is no option", noisy)
    assert asked[0] == "espeak-ng --stdout -v en-us+m7 -s 150 -p 40 --".split() + [
        "-v is no option"
    ]
    assert clean.dtype == np.float32 and np.abs(heard).max() <= 1
    ratio = np.std(heard - clean) / np.sqrt(np.mean(clean**2))
    assert ratio == pytest.approx(0.1, rel=0.05)
    monkeypatch.setattr(speech.shutil, "which", lambda name: None)
    with pytest.raises(MissingExtra, match="apt-get install espeak-ng"):
        speech.say(np.random.default_rng(0), "hello", quiet)


@pytest.mark.parametrize(
    ("heard", "wanted", "distance"),
    [
        ("", "abc", 3),
        ("abc", "abc", 0),
        ("kitten", "sitting", 3),
        ("ab", "ba", 2),
        ("aabb", "ab", 2),
    ],
)
def test_errors_are_insertions_deletions_and_replacements(heard, wanted, distance):
    assert hearing.errors(heard, wanted) == hearing.errors(wanted, heard) == distance


def test_what_is_likeliest_is_read_and_what_repeats_is_read_once(small):
    model, tokenizer = small
    embeddings = model.get_input_embeddings().weight
    written = hearing.Written(tokenizer, ["red dog", "red cat"], embeddings)
    assert len(written.ids) == 3
    red, dog = written.targets("red dog").tolist()
    assert written.targets("zebra red").tolist()[-1] == red
    nothing = len(written.ids)
    rows = [red, red, nothing, red, dog, dog, nothing, nothing]
    vectors = torch.cat([written.words, written.nothing.detach()[None]])
    features = written.centre + vectors[rows]
    found = written.log_probabilities(features)
    assert found.shape == (len(rows), 4) and found.argmax(-1).tolist() == rows
    assert found.exp().sum(-1).tolist() == pytest.approx([1] * len(rows), abs=1e-5)
    assert written.read(features) == [red, red, dog]


def test_the_loss_sums_over_all_ways_to_say_it(small):
    """Two tokens of sound, one word: word word, word nothing, nothing word."""
    model, tokenizer = small
    written = hearing.Written(tokenizer, ["red dog"], model.get_input_embeddings().weight)
    features = written.centre + written.length * torch.nn.functional.normalize(
        torch.randn(1, 2, 24, generator=torch.Generator().manual_seed(0)), dim=-1
    )
    likely = written.log_probabilities(features)[0].detach().exp().double()
    word, nothing = int(written.targets("red")[0]), len(written.ids)
    ways = [(word, word), (word, nothing), (nothing, word)]
    expected = -np.log(sum(float(likely[0, a] * likely[1, b]) for a, b in ways))
    assert written.loss(features, ["red"]).item() == pytest.approx(expected, rel=1e-4)
    longer = written.centre + 2 * (features - written.centre)
    added = written.loss(longer, ["red"]).item() - expected
    assert added == pytest.approx(0.1 * np.log(2) ** 2, rel=1e-3)


def test_an_ear_is_trained_saved_and_kept(tmp_path, monkeypatch, small):
    """With voices that are noise: what is written, and that a finished one is not trained again."""
    model, tokenizer = small

    def say(rng, text, voice):
        return rng.standard_normal(ear.RATE).astype(np.float32)

    monkeypatch.setattr(hearing, "say", say)
    monkeypatch.setattr(hearing, "build_ear", lambda tokenizer, seed: model)
    settings = {"learning_rate": 1e-3, "steps": 2, "batch": 3, "seed": 0, "clips": 4}
    monkeypatch.setattr(hearing, "EAR", settings)
    monkeypatch.setattr(hearing, "ASKED", 2)
    before = {n: p.clone() for n, p in model.model.multi_modal_projector.named_parameters()}
    hearing.build(tmp_path)
    written = load_file(tmp_path / "ear" / "projector.safetensors")
    for name, weight in model.model.multi_modal_projector.named_parameters():
        assert torch.equal(written[name], weight.half()) and not torch.equal(weight, before[name])
    log = json.loads((tmp_path / "ear.json").read_text())
    assert log["samples"] == 6 and log["clips"] == 4 and len(log["loss"]) == 2
    assert set(log["token_errors"]) == {"validation", "test"}
    assert all(0 < share for share in log["token_errors"].values())
    hearing.build(tmp_path)
    assert json.loads((tmp_path / "ear.json").read_text()) == log
