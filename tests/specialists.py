"""Tiny stock specialists, LLaVA, Qwen2-Audio and Video-LLaVA, on one Llama."""

from types import SimpleNamespace

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
)

WORDS, AUDIO_TOKENS = 40, 10
TEXT = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": WORDS + 2,
    "pad_token_id": 0,
}
VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
AUDIO = {
    "model_type": "qwen2_audio_encoder",
    "d_model": 16,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "num_mel_bins": 8,
    "max_source_positions": 2 * AUDIO_TOKENS,
}
SPECIALISTS = {
    "vision": (
        LlavaForConditionalGeneration,
        LlavaConfig(vision_config=VISION, text_config=TEXT, image_token_id=WORDS),
        ["<image>"],
    ),
    "audio": (
        Qwen2AudioForConditionalGeneration,
        Qwen2AudioConfig(audio_config=AUDIO, text_config=TEXT, audio_token_id=WORDS),
        ["<|AUDIO|>"],
    ),
    "video": (
        VideoLlavaForConditionalGeneration,
        VideoLlavaConfig(
            vision_config=VISION, text_config=TEXT, image_token_id=WORDS, video_token_id=WORDS + 1
        ),
        ["<image>", "<video>"],
    ),
}


def save_tokenizer(folder, added=(), first="w0"):
    words = ["<pad>", "<s>", "</s>", first, *(f"w{i}" for i in range(1, WORDS - 3))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")
    fast.add_special_tokens({"additional_special_tokens": list(added)})
    fast.save_pretrained(folder)


def make_family(root):
    """`.base`, `.folders` and `.models` (modality -> specialist), `.inputs` for each modality."""
    torch.manual_seed(0)
    settings = {k: v for k, v in TEXT.items() if k != "model_type"} | {"vocab_size": WORDS}
    base = LlamaForCausalLM(LlamaConfig(**settings, tie_word_embeddings=False))
    base.save_pretrained(root / "base")
    save_tokenizer(root / "base")
    loaded, folders = {}, {}
    for modality, (model_class, config, added) in SPECIALISTS.items():
        model = model_class(config).eval()
        own = model.model.language_model.state_dict()
        for name, start in base.model.state_dict().items():
            noise = 0.02 * torch.randn_like(start) if ".layers" in f".{name}" else 0.0
            own[name][: len(start)] = start + noise
        model.lm_head.weight.data[:WORDS] = base.lm_head.weight.data
        folders[modality] = root / modality
        model.save_pretrained(folders[modality])
        save_tokenizer(folders[modality], added)
        loaded[modality] = model
    inputs = {
        "vision": {"pixel_values": torch.randn(1, 3, 28, 28)},
        "audio": {
            "input_features": torch.randn(1, 8, 4 * AUDIO_TOKENS),
            "feature_attention_mask": torch.ones(1, 4 * AUDIO_TOKENS, dtype=torch.long),
        },
        "video": {"pixel_values_videos": torch.randn(1, 2, 3, 28, 28)},
    }
    return SimpleNamespace(base=root / "base", folders=folders, models=loaded, inputs=inputs)


def prompt(*modalities, ids=(WORDS, WORDS + 1, WORDS + 2)):
    """Token numbers of a prompt with one block of placeholders for each modality."""
    image, audio, video = ids
    blocks = {"vision": [image] * 4, "audio": [audio] * AUDIO_TOKENS, "video": [video] * 10}
    tokens = [1, 5]
    for modality in modalities:
        tokens += blocks[modality] + [7]
    return torch.tensor([[*tokens, 9]])
