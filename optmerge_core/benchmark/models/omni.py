"""Tiny specialists for the Omni benchmark: stock classes on one Vicuna-style language model.

Vision is LLaVA (a CLIP tower), audio Qwen2-Audio (a Whisper-style encoder), video Video-LLaVA (a
CLIP tower that sees picture after picture), each with its own projector, all on one Llama. Video is
given what changes from one picture to the next, as two-stream networks are, so that the still image
and the motion are different inputs.
"""

import re

import numpy as np
import torch
from transformers import (
    CLIPImageProcessorPil,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
    WhisperFeatureExtractor,
)

from optmerge_core.benchmark.models.tokenizer import word_level
from optmerge_core.benchmark.tasks.clips import FRAMES, NEEDS, RATE, clip, questions, told
from optmerge_core.benchmark.tasks.scenes import IMAGE_SIZE

MODALITIES = ("vision", "audio", "video")
PATCH = 14
PLACEHOLDERS = {"vision": "<image>", "audio": "<|AUDIO|>", "video": "<video>"}
PATCHES = (IMAGE_SIZE // PATCH) ** 2
FEATURES = {"vision": PATCHES, "audio": 25, "video": (FRAMES - 1) * (PATCHES + 1)}
"""Features, and so placeholder tokens, of one clip: the video tower keeps its class token."""
PIECES = r" ?[A-Za-z]+(?:-[A-Za-z]+)*:?| ?[0-9]| ?[^\sA-Za-z0-9]"
HIDDEN, MELS = 128, 40


def prompt(question, modalities=(), words=None):
    """What a model is asked: each modality's placeholders or words, then the question.

    words: modality -> what it has to tell (`in_words`), for those that are described instead.
    """
    words = words or {}
    blocks = [
        f" {words[m]} ." if m in words else FEATURES[m] * PLACEHOLDERS[m]
        for m in MODALITIES
        if m in words or m in modalities
    ]
    return f"USER:{''.join(blocks)} {question} ASSISTANT:"


def in_words(item, modalities):
    """Modality -> what it has to tell about a clip, in words."""
    return {m: told(item, m) for m in modalities}


def describe(item, modalities):
    """The modalities in words, in the order in which their features would stand."""
    return " ".join(f"{told(item, m)} ." for m in MODALITIES if m in modalities)


def build_tokenizer(modality=None):
    """The language model's tokenizer, and with a modality its placeholder added."""
    texts = ["USER: ASSISTANT: describe the clip ."]
    for i in range(400):
        item = clip(np.random.default_rng([5, i]))
        texts += [told(item, m) for m in MODALITIES]
        texts += [f"{question} {answer}" for question, answer, _ in questions(item)]
    pieces = {p for text in texts for p in re.findall(PIECES, text)}
    words = sorted({w.replace(" ", "Ġ") for p in pieces for w in (p, " " + p.strip(), p.strip())})
    ordered = ["<pad>", "<s>", "</s>", "<unk>", *words]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=word_level(ordered, PIECES),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    own = {"vision": ["<image>"], "audio": ["<|AUDIO|>"], "video": ["<image>", "<video>"]}
    fast.add_special_tokens({"additional_special_tokens": own.get(modality, [])})
    return fast


def text_settings(tokenizer):
    return {
        "model_type": "llama",
        "vocab_size": len(tokenizer),
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "initializer_range": 0.06,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def build_language_model(tokenizer, seed=0):
    """A Llama with random weights; a word with hyphens starts as the sum of its parts."""
    torch.manual_seed(seed)
    settings = {k: v for k, v in text_settings(tokenizer).items() if k != "model_type"}
    model = LlamaForCausalLM(LlamaConfig(**settings))
    vocabulary, rows = tokenizer.get_vocab(), model.model.embed_tokens.weight.data
    for word, number in vocabulary.items():
        parts = word.removeprefix("Ġ").split("-")
        if len(parts) > 1:
            rows[number] = sum(rows[vocabulary[f"Ġ{part}"]] for part in parts)
    return model


VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH,
    "initializer_range": 0.06,
}
AUDIO = {
    "model_type": "qwen2_audio_encoder",
    "d_model": 96,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 192,
    "num_mel_bins": MELS,
    "max_source_positions": 50,
    "init_std": 0.06,
}


def build_specialist(modality, seed=0):
    """A specialist with random weights; `training` puts the common language model into it."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(modality)
    text = text_settings(tokenizer)
    number = tokenizer.convert_tokens_to_ids(PLACEHOLDERS[modality])
    if modality == "audio":
        config = Qwen2AudioConfig(audio_config=AUDIO, text_config=text, audio_token_id=number)
        return Qwen2AudioForConditionalGeneration(config), tokenizer
    if modality == "vision":
        config = LlavaConfig(
            vision_config=VISION,
            text_config=text,
            image_token_id=number,
            image_seq_length=PATCHES,
        )
        return LlavaForConditionalGeneration(config), tokenizer
    config = VideoLlavaConfig(
        vision_config=VISION,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_id=number,
        video_seq_length=FEATURES["video"],
    )
    return VideoLlavaForConditionalGeneration(config), tokenizer


def image_processor():
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False)


def feature_extractor():
    return WhisperFeatureExtractor(feature_size=MELS, sampling_rate=RATE, chunk_length=1)


def changes(item):
    """From each frame to the next, grey where nothing changes: uint8 (FRAMES - 1, 56, 56, 3)."""
    frames = item.frames.astype(np.int16)
    return (128 + (frames[1:] - frames[:-1]) // 2).astype(np.uint8)


def modality_inputs(clips, modalities, images, sounds):
    """Clips -> what `OmniForConditionalGeneration` takes: modality -> its specialist's inputs.

    images, sounds: the stock processors of `image_processor` and `feature_extractor`.
    """
    found = {}
    if "vision" in modalities:
        found["vision"] = dict(images([c.picture for c in clips], return_tensors="pt"))
    if "audio" in modalities:
        heard = sounds(
            [c.sound for c in clips],
            sampling_rate=RATE,
            return_tensors="pt",
            return_attention_mask=True,
        )
        found["audio"] = {
            "input_features": heard["input_features"],
            "feature_attention_mask": heard["attention_mask"],
        }
    if "video" in modalities:
        pictures = [picture for c in clips for picture in changes(c)]
        pixels = images(pictures, return_tensors="pt")["pixel_values"]
        found["video"] = {"pixel_values_videos": pixels.unflatten(0, (len(clips), FRAMES - 1))}
    return found


def answerable(kind, modalities):
    """Whether these modalities are all that a kind of question needs."""
    return set(NEEDS[kind]) <= set(modalities)
