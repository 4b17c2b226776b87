"""A model that hears: Whisper tiny.en's encoder before SmolLM2, as a stock Voxtral.

Voxtral is Whisper's encoder, four frames of 20 ms side by side, two layers of projector and a
Llama; so a token is 80 ms of sound. (Qwen2-Audio's is 40, and its projector one layer.) The
encoder's positions are cut to a window of WINDOW seconds, so that no silence is computed that a
question does not need. A longer recording is several windows: it has as many tokens as it is long.
"""

import numpy as np
import torch
from transformers import VoxtralConfig, VoxtralForConditionalGeneration, WhisperFeatureExtractor

from optmerge_core.benchmark.models import whisper
from optmerge_core.benchmark.models.family import stop_at_the_end
from optmerge_core.benchmark.models.smol import AUDIO, language_model

RATE = 16000
WINDOW = 4  # seconds
FRAMES = 50 * WINDOW  # of 20 ms
STACKED = 4  # frames in a token
TOKENS = FRAMES // STACKED  # of a window


def build_ear(tokenizer, seed=0):
    """SmolLM2 behind Whisper's encoder and a projector with random weights, from the seed."""
    torch.manual_seed(seed)
    encoder = whisper.whisper().model.encoder.state_dict()
    config = VoxtralConfig(
        audio_config={
            "hidden_size": whisper.WIDTH,
            "intermediate_size": STACKED * whisper.WIDTH,
            "num_hidden_layers": whisper.LAYERS,
            "num_attention_heads": whisper.HEADS,
            "num_mel_bins": whisper.MELS,
            "max_source_positions": FRAMES,
        },
        text_config=language_model().config.to_dict(),
        audio_token_id=tokenizer.convert_tokens_to_ids(AUDIO),
    )
    model = VoxtralForConditionalGeneration(config)
    cut = {"embed_positions.weight": encoder["embed_positions.weight"][:FRAMES]}
    model.model.audio_tower.load_state_dict(encoder | cut)
    model.model.language_model.load_state_dict(language_model().model.state_dict())
    model.lm_head.load_state_dict(language_model().lm_head.state_dict())
    return stop_at_the_end(model, tokenizer)


def feature_extractor():
    """The log-Mel spectrogram of a window; what is louder or softer looks the same to Whisper."""
    return WhisperFeatureExtractor(
        feature_size=whisper.MELS, sampling_rate=RATE, chunk_length=WINDOW
    )


def windows(sound):
    """A recording, (samples,) at RATE -> its windows (n, RATE * WINDOW), the last with silence."""
    if sound.ndim != 1 or not len(sound):
        raise ValueError(f"a recording of shape {sound.shape}; give samples of one channel: (n,)")
    size = RATE * WINDOW
    count = -(-len(sound) // size)
    return np.pad(sound, (0, count * size - len(sound))).reshape(count, size)


def spectrograms(sounds):
    """Recordings -> (windows of all, Mel bands, 100 a second), float32."""
    given = [window for sound in sounds for window in windows(np.asarray(sound, np.float32))]
    return feature_extractor()(given, sampling_rate=RATE, return_tensors="pt").input_features
