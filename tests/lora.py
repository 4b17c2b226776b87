"""A tiny language model and LoRA adapters of it, saved as PEFT saves them."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def tiny_model():
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=40,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=36,
        tie_word_embeddings=True,
    )
    return Qwen2ForCausalLM(config)


def make_adapter(folder, seed, **settings):
    config = LoraConfig(**({"r": 3, "lora_alpha": 5, "target_modules": LINEAR} | settings))
    model = get_peft_model(tiny_model(), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return folder


def make_lora_family(root):
    """The base's folder, and name -> folder of three adapters: plain, rsLoRA, an alpha pattern."""
    tiny_model().save_pretrained(root / "base")
    settings = [{}, {"r": 2, "use_rslora": True}, {"alpha_pattern": {"layers.1.mlp.up_proj": 9}}]
    experts = {
        f"e{i}": make_adapter(root / f"e{i}", i, **options) for i, options in enumerate(settings)
    }
    return root / "base", experts
