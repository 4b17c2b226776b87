"""Families with rules of their own, tiny: the real classes' configs, a picture or a sound each."""

from copy import deepcopy
from typing import NamedTuple

import torch
import transformers
from torch import nn
from transformers import AutoModel, Gemma3nVisionConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

IMAGE, AUDIO_TOKEN = 5, 6
AUDIO_START, AUDIO_END = 10, 11
TEXT = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "bos_token_id": 0,
    "eos_token_id": 1, "pad_token_id": 0, "max_position_embeddings": 128,
}  # fmt: skip
MIXTURE = TEXT | {
    "num_experts": 2, "num_local_experts": 2, "n_routed_experts": 2, "num_experts_per_tok": 1,
    "top_k_experts": 1, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8,
    "intermediate_size_mlp": 24,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip
QWEN_VISION = {
    "depth": 2, "hidden_size": 16, "out_hidden_size": 16, "num_heads": 2, "patch_size": 4,
    "intermediate_size": 24, "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
    "fullatt_block_indexes": [0], "window_size": 16, "image_size": 16,
}  # fmt: skip
WHISPER = {
    "d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32,
    "num_mel_bins": 8, "max_source_positions": 20, "output_dim": 16, "downsample_hidden_size": 4,
}  # fmt: skip
TOKENS = {
    "image_token_id": IMAGE, "image_token_index": IMAGE, "audio_token_id": AUDIO_TOKEN,
    "video_token_id": 7, "vision_start_token_id": 8, "vision_end_token_id": 9,
    "image_start_token_id": 8, "image_end_token_id": 9,
}  # fmt: skip
ROPE = {"rope_parameters": {
    "rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0,
}}  # fmt: skip
PIXELS = torch.linspace(-1, 1, 768).view(1, 3, 16, 16)
PATCHES = {
    "pixel_values": torch.linspace(-1, 1, 384).view(4, 96),
    "image_grid_thw": torch.tensor([[1, 2, 2]]),
    "mm_token_type_ids": torch.tensor([[1, 0, 0]]),
}
WAVES = torch.sin(torch.arange(320) / 3).view(1, 40, 8)  # frames × bins
MEL = {"input_features": WAVES.mT, "feature_attention_mask": torch.ones(1, 40, dtype=torch.long)}
GEMMA_SOUND = {"input_features_mask": torch.ones(1, 16, dtype=torch.bool)}
FOUR_SOUNDS = {"mm_token_type_ids": torch.zeros(1, 8, dtype=torch.long)}
TWO_KINDS = {"layer_types": ["sliding_attention", "full_attention"], "global_head_dim": 8}
LINEAR_ATTENTION = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
    "linear_num_value_heads": 2, "linear_key_head_dim": 4, "linear_value_head_dim": 4,
}  # fmt: skip
PER_LAYER = {"hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 64}
GEMMA3N = TEXT | TWO_KINDS | PER_LAYER | {
    "laurel_rank": 4, "altup_num_inputs": 2, "num_kv_shared_layers": 0,
}  # fmt: skip
GEMMA_VISION = VISION | {
    "head_dim": 8, "num_key_value_heads": 2, "position_embedding_size": 16,
    "pooling_kernel_size": 2,
}  # fmt: skip
GEMMA_PIXELS = {
    "pixel_values": torch.rand(1, 4, 192),
    "image_position_ids": torch.tensor([[[0, 0], [0, 1], [1, 0], [1, 1]]]),
    "mm_token_type_ids": torch.tensor([[1, 0, 0]]),
}
SPEAKING = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8,
    "num_key_value_heads": 2, "intermediate_size": 24,
}  # fmt: skip


class Family(NamedTuple):
    model: str
    """the class in transformers; its config's class has the same name but for the ending"""
    config: dict
    tokens: int = 0
    """placeholders of one image in the prompt"""
    inputs: dict = {}
    """what `forward` takes besides text"""
    language: str = ""
    """the module whose linear layers merge, where `get_decoder` is not it"""
    speech: tuple[str, ...] = ()
    """modules whose linear layers merge too with the scope "speech" """
    model_type: str = ""
    """where it is not the entry's name"""
    sound: tuple[int, dict] = (0, {})
    """placeholders of one sound in the prompt, and what `forward` takes of it"""


class Tower(PreTrainedModel):
    """In the place of Gemma-3n's, which needs the package timm."""

    config_class = Gemma3nVisionConfig
    _tied_weights_keys = None

    def __init__(self, config):
        super().__init__(config)
        self.layers = nn.ModuleList([nn.Conv2d(3, config.hidden_size, 8, 8), nn.Linear(2, 2)])
        self.post_init()

    def forward(self, pixel_values, **_):
        return BaseModelOutputWithPooling(self.layers[1](self.layers[0](pixel_values)))


AutoModel.register(Gemma3nVisionConfig, Tower, exist_ok=True)


def thinker(text: dict) -> dict:
    return TOKENS | {
        "text_config": text | ROPE,
        "vision_config": QWEN_VISION,
        "audio_config": WHISPER,
        "audio_start_token_id": AUDIO_START,
        "audio_end_token_id": AUDIO_END,
    }


def internvl(**text) -> Family:
    return Family(
        "InternVLForConditionalGeneration",
        TOKENS | {
            "text_config": MIXTURE | text, "image_seq_length": 1,
            "vision_config": VISION | {"image_size": [16, 16], "patch_size": [8, 8]},
        },
        1, {"pixel_values": PIXELS}, model_type="internvl",
    )  # fmt: skip


def qwen(name: str, text: dict, vision: dict = QWEN_VISION) -> Family:
    config = TOKENS | {"text_config": ROPE | text, "vision_config": vision}
    return Family(f"{name}ForConditionalGeneration", config, 1, PATCHES)


FAMILIES = {
    "qwen3_5": qwen("Qwen3_5", TEXT | LINEAR_ATTENTION),
    "qwen3_5_moe": qwen("Qwen3_5Moe", MIXTURE | LINEAR_ATTENTION),
    "qwen3_5_text": Family("Qwen3_5ForCausalLM", TEXT | LINEAR_ATTENTION),
    "qwen3_5_moe_text": Family("Qwen3_5MoeForCausalLM", MIXTURE | LINEAR_ATTENTION),
    "qwen3_vl_moe": qwen("Qwen3VLMoe", MIXTURE),
    "glm4v": qwen("Glm4v", TEXT),
    "glm46v": qwen(
        "Glm46V", TEXT | {"model_type": "glm4v_text"}, QWEN_VISION | {"model_type": "glm4v_vision"}
    ),
    "glm4v_moe": qwen(
        "Glm4vMoe",
        MIXTURE | {
            "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
            "rope_parameters": ROPE["rope_parameters"] | {"partial_rotary_factor": 1.0},
        },
    ),
    "qwen2_5_omni_thinker": Family(
        "Qwen2_5OmniThinkerForConditionalGeneration", thinker(TEXT), 1, PATCHES, sound=(10, MEL)
    ),
    "qwen2_5_omni": Family(
        "Qwen2_5OmniForConditionalGeneration",
        {
            "thinker_config": thinker(TEXT),
            "talker_config": TEXT | TOKENS | ROPE | {"embedding_size": 16},
            "token2wav_config": {
                "dit_config": SPEAKING | {
                    "emb_dim": 8, "num_embeds": 16, "mel_dim": 8, "enc_emb_dim": 8, "enc_dim": 8,
                    "enc_channels": [8, 8, 8, 8, 24], "enc_attention_channels": 8,
                    "enc_se_channels": 8, "enc_res2net_scale": 2,
                },
                "bigvgan_config": {
                    "mel_dim": 8, "upsample_initial_channel": 16, "upsample_rates": [2],
                    "upsample_kernel_sizes": [4], "resblock_kernel_sizes": [3],
                    "resblock_dilation_sizes": [[1, 3, 5]],
                },
            },
        },
        1, PATCHES, "thinker.model.language_model",
        ("talker.model.layers", "token2wav.code2wav_dit_model.transformer_blocks"),
        sound=(10, MEL),
    ),
    "qwen3_omni_moe_thinker": Family(
        "Qwen3OmniMoeThinkerForConditionalGeneration", thinker(MIXTURE), 1, PATCHES, sound=(5, MEL)
    ),
    "qwen3_omni_moe": Family(
        "Qwen3OmniMoeForConditionalGeneration",
        {
            "thinker_config": thinker(MIXTURE),
            "talker_config": TOKENS | {
                "thinker_hidden_size": 16, "num_code_groups": 4, "spatial_merge_size": 2,
                "text_config": MIXTURE | ROPE,
                "code_predictor_config": TEXT | {"num_code_groups": 4},
            },
            "code2wav_config": SPEAKING | {
                "codebook_size": 16, "num_quantizers": 4, "upsample_rates": [2],
                "upsampling_ratios": [2], "decoder_dim": 16, "max_position_embeddings": 64,
            },
        },
        1, PATCHES, "thinker.model.language_model",
        (
            "talker.model.layers", "talker.code_predictor.model.layers",
            "code2wav.pre_transformer.layers",
        ),
        sound=(5, MEL),
    ),
    "gemma3n": Family(
        "Gemma3nForConditionalGeneration",
        TOKENS | {
            "text_config": GEMMA3N, "vision_soft_tokens_per_image": 4,
            "audio_soft_tokens_per_image": 4,
            "vision_config": {"hidden_size": 16, "vocab_size": 4, "vocab_offset": 56},
            "audio_config": {
                "hidden_size": 16, "conf_num_attention_heads": 2, "conf_num_hidden_layers": 1,
                "sscp_conv_channel_size": [4, 2], "input_feat_size": 8, "vocab_size": 4,
                "vocab_offset": 60,
            },
        },
        4, {"pixel_values": PIXELS}, sound=(4, GEMMA_SOUND | {"input_features": WAVES[:, :16]}),
    ),
    "gemma3n_text": Family("Gemma3nForCausalLM", GEMMA3N),
    "gemma4": Family(
        "Gemma4ForConditionalGeneration",
        TOKENS | {
            "text_config": TEXT | TWO_KINDS | PER_LAYER, "vision_config": GEMMA_VISION,
            "audio_config": {
                "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                "subsampling_conv_channels": [4, 2], "output_proj_dims": 16,
            },
        },
        1, GEMMA_PIXELS,
        sound=(4, GEMMA_SOUND | FOUR_SOUNDS | {"input_features": WAVES[:, :16, :4]}),
    ),
    "gemma4, a mixture": Family(
        "Gemma4ForConditionalGeneration",
        TOKENS | {
            "text_config": MIXTURE | TWO_KINDS | {
                "enable_moe_block": True, "hidden_size_per_layer_input": 0,
                "attention_k_eq_v": True,
            },
            "vision_config": GEMMA_VISION, "audio_config": None,
        },
        1, GEMMA_PIXELS, model_type="gemma4",
    ),
    "gemma4_text": Family("Gemma4ForCausalLM", TEXT | TWO_KINDS | PER_LAYER),
    "gemma4_unified": Family(
        "Gemma4UnifiedForConditionalGeneration",
        TOKENS | {
            "text_config": TEXT | TWO_KINDS, "audio_config": {"audio_embed_dim": 8},
            "vision_config": {
                "patch_size": 4, "pooling_kernel_size": 2, "mm_embed_dim": 16, "mm_posemb_size": 4,
            },
        },
        sound=(4, FOUR_SOUNDS | {
            "input_features": WAVES[:, :4],
            "input_features_mask": torch.ones(1, 4, dtype=torch.bool),
        }),
    ),
    "llama4": Family(
        "Llama4ForConditionalGeneration",
        TOKENS | {
            "text_config": MIXTURE | {"interleave_moe_layer_step": 2},
            "vision_config": VISION | {
                "vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16,
                "intermediate_size": 64,
            },
        },
        1, {"pixel_values": PIXELS}, "language_model.model",
    ),
    "llama4_text": Family(
        "Llama4ForCausalLM", MIXTURE | {"interleave_moe_layer_step": 2}, language="model"
    ),
    "mllama": Family(
        "MllamaForConditionalGeneration",
        TOKENS | {
            "text_config": TEXT | {"cross_attention_layers": [1]},
            "vision_config": VISION | {
                "attention_heads": 2, "num_global_layers": 1, "intermediate_layers_indices": [0],
                "vision_output_dim": 32,
            },
        },
        1,
        {
            "pixel_values": PIXELS.expand(4, -1, -1, -1)[None, None],
            "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.long),
            "aspect_ratio_mask": torch.ones(1, 1, 4, dtype=torch.long),
            "cross_attention_mask": torch.ones(1, 3, 1, 4, dtype=torch.long),
        },
    ),
    "mistral3": Family(
        "Mistral3ForConditionalGeneration",
        TOKENS | {
            "text_config": TEXT | {"model_type": "mistral"},
            "vision_config": VISION | {"model_type": "pixtral", "head_dim": 8, "image_size": 32},
        },
        2,
        {"pixel_values": PIXELS.repeat(1, 1, 2, 1), "image_sizes": torch.tensor([[32, 16]])},
    ),
    "pixtral": Family(  # Pixtral-12B's files are LLaVA's
        "LlavaForConditionalGeneration",
        TOKENS | {
            "text_config": TEXT | {"model_type": "mistral"}, "image_seq_length": 4,
            "vision_config": VISION | {"model_type": "pixtral", "head_dim": 8},
            "vision_feature_layer": -1, "vision_feature_select_strategy": "full",
        },
        4, {"pixel_values": PIXELS, "image_sizes": torch.tensor([[16, 16]])}, model_type="llava",
    ),
    "phi4_multimodal": Family(
        "Phi4MultimodalForCausalLM",
        TEXT | {
            "vision_config": VISION | {"crop_size": 16},
            "audio_config": {
                "hidden_size": 16, "intermediate_size": 24, "num_blocks": 1,
                "num_attention_heads": 2, "ext_pw_out_channel": 16, "nemo_conv_channels": 4,
                "nemo_final_size": 1, "input_size": 8, "conv_expansion": 1,
                "depthwise_separable_out_channel": 16, "audio_token_id": AUDIO_TOKEN,
            },
        },
        language="model.layers",
        sound=(2, {
            "audio_input_features": WAVES[:, :16], "audio_embed_sizes": torch.tensor([2]),
        }),
    ),
    "qwen2_audio": Family(
        "Qwen2AudioForConditionalGeneration",
        {
            "text_config": TEXT | {"model_type": "qwen2"}, "audio_token_index": AUDIO_TOKEN,
            "audio_config": WHISPER,
        },
        sound=(10, MEL),
    ),
    "nemotron_h": Family(
        "NemotronHForCausalLM",
        {key: MIXTURE[key] for key in MIXTURE if key != "num_hidden_layers"} | {
            "layers_block_type": ["mamba", "moe", "attention", "mlp"], "mamba_num_heads": 2,
            "mamba_head_dim": 8, "ssm_state_size": 4, "n_groups": 1, "chunk_size": 4,
            "moe_shared_expert_intermediate_size": 8,
        },
    ),
    "internvl, Qwen3": internvl(model_type="qwen3"),
    "internvl, Qwen3-MoE": internvl(model_type="qwen3_moe"),
    "internvl, gpt-oss": internvl(model_type="gpt_oss"),
    "smolvlm": Family(
        "SmolVLMForConditionalGeneration",
        TOKENS | {
            "text_config": TEXT | {"model_type": "llama"}, "vision_config": VISION,
            "scale_factor": 2,
        },
        1, {"pixel_values": PIXELS[None]},
    ),
}  # fmt: skip


def class_of(family: Family) -> type[PreTrainedModel]:
    return getattr(transformers, family.model)


def build(name: str, seed: int = 0) -> PreTrainedModel:
    """The tiny model; from its seed 0 all parameters of another seed are moved, a tower's too."""
    cls = class_of(FAMILIES[name])
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        config = deepcopy(FAMILIES[name].config)  # which some config classes add to
        model = cls(cls.config_class(**config)).eval()
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
        torch.manual_seed(seed)
        for parameter in model.parameters() if seed else ():
            parameter += 0.01 * torch.randn_like(parameter)
    return model


def save(model: PreTrainedModel, folder, original: bool = True):
    model.save_pretrained(folder, save_original_format=original)
    if model.config.model_type == "qwen2_5_omni":  # its class opens no folder without voices
        torch.save({}, folder / "spk_dict.pt")
    return folder
