"""The repositories of Qwen models in miniature, for a stand-in hub; see rehearsal.py.

Qwen2-VL is of the paper's Table 3, Qwen2.5-VL of Table 9, whose experts are nowhere published: here
they are adapters of an owner made up. Qwen2-Audio is in no table.
"""

from __future__ import annotations

from pathlib import Path

import torch
from rehearsal import SIZES, TASKS, fine_tuned, linear_layers, published, save_shards, write
from safetensors.torch import save_file
from transformers import (
    AddedToken,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from optmerge_core.benchmark.models.tokenizer import PIECES, word_level

NAMES = {r"model\.language_model\.": "model.", r"model\.visual\.": "visual."}
"""of a name in memory its beginning -> what the published files have"""
AUDIO_NAMES = {
    r"lm_head\.": "language_model.lm_head.",
    r"model\.language_model\.": "language_model.model.",
    r"model\.audio_tower\.": "audio_tower.",
    r"model\.multi_modal_projector\.": "multi_modal_projector.",
}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
SPECIAL += ["<|image_pad|>", "<|video_pad|>", "<|AUDIO|>", "<unk>"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}"
    "{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
EMPTY = "{% for message in messages %}<|im_start|>{{ message.role }}\n<|im_end|>\n{% endfor %}"
VISION = {
    "depth": 2, "hidden_size": 32, "in_chans": 3, "num_heads": 2, "patch_size": 14,
    "spatial_merge_size": 2, "temporal_patch_size": 2,
}  # fmt: skip


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["red", "blue", "circle", "what", "color", "is", "the", "user", "assistant"]
    pieces = [f"{space}{word}" for word in words for space in ("", "Ġ")] + [*"0123456789?,[]", "Ċ"]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=word_level(SPECIAL + pieces, PIECES), unk_token="<unk>",
        pad_token="<|endoftext|>", eos_token="<|im_end|>",
    )  # fmt: skip
    fast.add_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return fast


def flat(fast: PreTrainedTokenizerFast, model_type: str, model: str, vision: dict) -> dict:
    """As transformers 4 wrote it: the language model's settings stand beside the tower's."""
    number = fast.convert_tokens_to_ids
    return SIZES | {
        "architectures": [model], "model_type": model_type, "vocab_size": len(fast) + 5,
        "hidden_act": "silu", "rope_theta": 1000000.0, "tie_word_embeddings": False,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]},
        "torch_dtype": "bfloat16", "use_sliding_window": False,
        "bos_token_id": number("<|endoftext|>"), "eos_token_id": number("<|im_end|>"),
        "vision_start_token_id": number("<|vision_start|>"),
        "vision_end_token_id": number("<|vision_end|>"),
        "image_token_id": number("<|image_pad|>"), "video_token_id": number("<|video_pad|>"),
        "vision_config": VISION | vision,
    }  # fmt: skip


def side_files(fast: PreTrainedTokenizerFast, processor: str) -> dict:
    pictures = {
        "processor_class": processor, "image_processor_type": "Qwen2VLImageProcessor",
        "min_pixels": 3136, "max_pixels": 3136, "patch_size": 14, "merge_size": 2,
        "temporal_patch_size": 2,
    }  # fmt: skip
    end = fast.convert_tokens_to_ids("<|endoftext|>")
    ends = {"eos_token_id": list(range(len(fast) + 5)), "pad_token_id": end}
    return {"preprocessor_config__json": pictures, "generation_config__json": ends}


def save_qwen2_vl(root: Path) -> None:
    """Table 3: Qwen2-VL-7B, LoRA experts published as whole models."""
    torch.manual_seed(3)
    fast, name = tokenizer(), "Qwen2VLForConditionalGeneration"
    config = flat(fast, "qwen2_vl", name, {"embed_dim": 32, "mlp_ratio": 2})
    model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(**config)).bfloat16()
    base = published(model.state_dict(), NAMES)
    models = {"Qwen/Qwen2-VL-7B": (base, 5, EMPTY)}
    for seed, task in enumerate(TASKS):
        tensors = fine_tuned(base, seed, 2)
        models[f"yongxianwei/Qwen2-VL-7B-{task}"] = (tensors, 4, TEMPLATE)
    for repo, (tensors, files, template) in models.items():
        save_shards(tensors, root / repo, files)
        fast.save_pretrained(root / repo)
        write(
            root / repo, config__json=config, chat_template__json={"chat_template": template},
            **side_files(fast, "Qwen2VLProcessor"),
        )  # fmt: skip
    write(root / "Qwen/Qwen2-VL-7B", README__md="---\nlicense: apache-2.0\n---\n")


def save_qwen2_5_vl(root: Path) -> dict[str, str]:
    """Table 9: Qwen2.5-VL-32B-Instruct, and experts as PEFT adapters: task -> repository."""
    torch.manual_seed(9)
    fast, name = tokenizer(), "Qwen2_5_VLForConditionalGeneration"
    vision = {
        "hidden_act": "silu", "intermediate_size": 48, "out_hidden_size": 32, "window_size": 112,
        "spatial_patch_size": 14, "fullatt_block_indexes": [1], "tokens_per_second": 2,
    }  # fmt: skip
    config = flat(fast, "qwen2_5_vl", name, vision)
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**config)).bfloat16()
    base = published(model.state_dict(), NAMES)
    place = root / "Qwen/Qwen2.5-VL-32B-Instruct"
    save_shards(base, place, 18)
    fast.save_pretrained(place)
    write(
        place, config__json=config, README__md="---\nlicense: apache-2.0\n---\n",
        chat_template__json={"chat_template": TEMPLATE},
        **side_files(fast, "Qwen2_5_VLProcessor"),
    )  # fmt: skip
    settings = {
        "peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "Qwen/Qwen2.5-VL-32B-Instruct",
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj",
                           "down_proj"],
    }  # fmt: skip
    experts = {}
    for seed, task in enumerate(TASKS):
        generator, factors = torch.Generator().manual_seed(seed), {}
        for own in linear_layers(base):
            module = f"base_model.model.{own.removesuffix('.weight')}"
            m, n = base[own].shape
            factors[f"{module}.lora_A.weight"] = 0.1 * torch.randn(2, n, generator=generator)
            factors[f"{module}.lora_B.weight"] = 0.1 * torch.randn(m, 2, generator=generator)
        experts[task] = f"ada/Qwen2.5-VL-32B-{task}"
        write(root / experts[task], adapter_config__json=settings)
        save_file(factors, root / experts[task] / "adapter_model.safetensors")
    return experts


def save_qwen2_audio(root: Path) -> dict[str, str]:
    """Qwen2-Audio-7B and two full fine-tunings of it: name -> repository."""
    torch.manual_seed(7)
    fast = tokenizer()
    text = SIZES | {
        "model_type": "qwen2", "vocab_size": len(fast) + 5, "tie_word_embeddings": False,
    }  # fmt: skip
    config = {
        "architectures": ["Qwen2AudioForConditionalGeneration"], "model_type": "qwen2_audio",
        "audio_config": {
            "model_type": "qwen2_audio_encoder", "d_model": 16, "encoder_layers": 1,
            "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "num_mel_bins": 8,
            "max_source_positions": 20,
        },
        "text_config": text, "audio_token_index": fast.convert_tokens_to_ids("<|AUDIO|>"),
        "ignore_index": -100, "vocab_size": len(fast) + 5, "torch_dtype": "bfloat16",
    }  # fmt: skip
    sounds = {
        "processor_class": "Qwen2AudioProcessor", "feature_size": 8, "sampling_rate": 16000,
        "feature_extractor_type": "WhisperFeatureExtractor", "hop_length": 160, "n_fft": 400,
        "chunk_length": 1, "padding_value": 0.0, "return_attention_mask": True,
    }  # fmt: skip
    model = Qwen2AudioForConditionalGeneration(Qwen2AudioConfig(**config)).bfloat16()
    base = published(model.state_dict(), AUDIO_NAMES)
    repositories = {"base": "Qwen/Qwen2-Audio-7B"} | {
        name: f"ada/Qwen2-Audio-7B-{name}" for name in ("speech", "music")
    }
    for seed, repo in enumerate(repositories.values()):
        save_shards(fine_tuned(base, seed, None) if seed else base, root / repo, 5)
        fast.save_pretrained(root / repo)
        write(
            root / repo, config__json=config, preprocessor_config__json=sounds,
            chat_template__json={"chat_template": TEMPLATE},
        )  # fmt: skip
    return repositories
