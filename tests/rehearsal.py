"""The repositories of the paper's studies in miniature, for a stand-in hub (hub.py).

Those of Qwen models are in rehearsal_qwen.py. Ids are those of data/recipes/paper_table*.yaml. The
layout is theirs as far as it is known here: tensor names as transformers' conversion tables
(conversion_mapping.py) and classes take them from the published files, and as the modules of
InternVL2.5's own code are called; config.json flat or nested as transformers 4 wrote it; several
shards with an index, and pickles for Vicuna. Sizes, words and weights are ours, and numbers of
shards where nothing is known. So are the Python files, a stub of InternVL2.5's: the same modules,
`chat`, and no `post_init`, which is missing there too, so that transformers 5 does not open it.
Vicuna's tokenizer is tokenizer.model alone, which needs sentencepiece: here it is tokenizer.json.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from specialists import VISION, WORDS, save_tokenizer
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
)

TASKS = ("OCR", "VQA", "Geometry", "Chart", "Grounding")
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6,
}  # fmt: skip
LLAVA_NAMES = {
    r"lm_head\.": "language_model.lm_head.",
    r"model\.language_model\.": "language_model.model.",
    r"model\.(\w+_tower)\.": r"\1.vision_model.",
    r"model\.multi_modal_projector\.": "multi_modal_projector.",
}
"""of a name in memory its beginning -> what the published files have"""
LINEAR = re.compile(r".*\blayers\.\d+\.(?:self_attn\.[qkvo]_proj|mlp\.\w+_proj)\.weight")


def published(state: dict, names: dict[str, str]) -> dict[str, torch.Tensor]:
    """A state dict under the names of the published files."""
    found = {}
    for name, tensor in state.items():
        new = (re.sub(rf"^{old}", to, name) for old, to in names.items() if re.match(old, name))
        found[next(new, name)] = tensor.detach().clone()
    return found


def save_shards(tensors: dict, folder: Path, files: int, pickled: bool = False) -> None:
    """The tensors over so many files, in their order, with the index; one file has none."""
    folder.mkdir(parents=True, exist_ok=True)
    stem, suffix = ("pytorch_model", ".bin") if pickled else ("model", ".safetensors")
    ordered, weight_map = list(tensors), {}
    for n in range(files):
        file = f"{stem}-{n + 1:05d}-of-{files:05d}{suffix}" if files > 1 else f"{stem}{suffix}"
        part = ordered[len(ordered) * n // files : len(ordered) * (n + 1) // files]
        weight_map |= dict.fromkeys(part, file)
        content = {name: tensors[name].contiguous() for name in part}
        if pickled:
            torch.save(content, folder / file)
        else:
            save_file(content, folder / file, metadata={"format": "pt"})
    if files > 1:
        size = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index))


def linear_layers(state: dict) -> list[str]:
    """Names of the language model's, as published."""
    return [n for n in state if LINEAR.fullmatch(n) and "vision" not in n and "tower" not in n]


def fine_tuned(base: dict, seed: int, rank: int | None) -> dict:
    """A copy whose linear layers of the language model have moved, by full or low rank."""
    generator, expert = torch.Generator().manual_seed(seed), dict(base)
    for name in linear_layers(base):
        m, n = base[name].shape
        change = torch.randn(m, rank or n, generator=generator)
        if rank:
            change = change @ torch.randn(rank, n, generator=generator) / rank**0.5
        expert[name] = (base[name].float() + 0.002 * change).to(base[name].dtype)
    return expert


def write(folder: Path, **files: object) -> None:
    """Side files, their names with `__` for the dot: JSON, or text as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name.replace("__", ".")).write_text(text)


# Table 2: InternVL2.5-1B, full fine-tuning, models that bring their own code.

STUB = {
    "configuration_internvl_chat__py": """
from transformers import PreTrainedConfig

class InternVLChatConfig(PreTrainedConfig):
    model_type = "internvl_chat"
""",
    "modeling_internvl_chat__py": """
from torch import nn
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM
from .configuration_internvl_chat import InternVLChatConfig
from .conversation import get_conv_template
from .modeling_intern_vit import InternVisionModel

class InternVLChatModel(PreTrainedModel):
    config_class = InternVLChatConfig
    _no_split_modules = ["InternVisionModel", "Qwen2DecoderLayer"]

    def __init__(self, config):
        super().__init__(config)
        self.vision_model = InternVisionModel(16)
        self.language_model = Qwen2ForCausalLM(Qwen2Config(**config.llm_config))
        parts = nn.LayerNorm(64), nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 32)
        self.mlp1 = nn.Sequential(*parts)
        self.template = get_conv_template(config.template)

    def forward(self, pixel_values, input_ids=None, attention_mask=None, **more):
        raise NotImplementedError("the stub sees nothing")

    def chat(self, tokenizer, pixel_values, question, generation_config):
        inputs = tokenizer(self.template.format(question), return_tensors="pt")
        tokens = self.language_model.generate(inputs["input_ids"], **generation_config)
        return tokenizer.decode(tokens[0])
""",
    "modeling_intern_vit__py": """
from torch import nn, ones

def block(n):
    inside = {"attn": {"qkv": (n, 3 * n), "proj": (n, n)}, "mlp": {"fc1": (n, 24), "fc2": (24, n)}}
    parts = {
        name: nn.ModuleDict({k: nn.Linear(*size) for k, size in sizes.items()})
        for name, sizes in inside.items()
    }
    layer = nn.ModuleDict(parts | {name: nn.LayerNorm(n) for name in ("norm1", "norm2")})
    layer.ls1, layer.ls2 = nn.Parameter(ones(n)), nn.Parameter(ones(n))
    return layer

class InternVisionModel(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.embeddings = nn.Module()
        self.embeddings.class_embedding = nn.Parameter(ones(1, 1, n))
        self.embeddings.patch_embedding = nn.Conv2d(3, n, 14, 14)
        self.embeddings.position_embedding = nn.Parameter(ones(1, 5, n))
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList([block(n), block(n)])
""",
    "conversation__py": """
def get_conv_template(name):
    return "w0 {} w1"
""",
}


def save_internvl(root: Path) -> None:
    torch.manual_seed(2)
    llm = SIZES | {"model_type": "qwen2", "vocab_size": 64, "tie_word_embeddings": False}
    language = Qwen2ForCausalLM(Qwen2Config(**llm)).state_dict()
    base = {f"language_model.{name}": x for name, x in language.items()}
    base |= {name: torch.randn(shape) * 0.02 for name, shape in internvl_vision().items()}
    base = {name: x.bfloat16() for name, x in base.items()}
    configuration, modeling = "configuration_internvl_chat", "modeling_internvl_chat"
    auto = {"AutoConfig": f"{configuration}.InternVLChatConfig"}
    auto |= dict.fromkeys(("AutoModel", "AutoModelForCausalLM"), f"{modeling}.InternVLChatModel")
    config = {
        "architectures": ["InternVLChatModel"], "auto_map": auto, "model_type": "internvl_chat",
        "llm_config": llm | {"architectures": ["Qwen2ForCausalLM"], "torch_dtype": "bfloat16"},
        "vision_config": {"architectures": ["InternVisionModel"], "model_type": "intern_vit_6b"},
        "template": "internvl2_5", "select_layer": -1, "downsample_ratio": 0.5,
        "torch_dtype": "bfloat16", "transformers_version": None,
    }  # fmt: skip
    pictures = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 448, "crop_size": 448}
    models = {"OpenGVLab/InternVL2_5-1B": base}
    for seed, task in enumerate(TASKS):
        models[f"yongxianwei/InternVL2_5-1B_{task}"] = fine_tuned(base, seed, None)
    for repo, tensors in models.items():
        save_shards(tensors, root / repo, 1)
        save_tokenizer(root / repo, ["<img>", "</img>", "<IMG_CONTEXT>"])
        write(root / repo, config__json=config, preprocessor_config__json=pictures, **STUB)
    card = "---\nlicense: mit\nlibrary_name: transformers\n---\n"
    write(root / "OpenGVLab/InternVL2_5-1B", README__md=card)


def internvl_vision() -> dict[str, tuple[int, ...]]:
    """The tower and the connector, by the modules of their own code."""
    layer = {
        "attn.qkv.weight": (48, 16), "attn.qkv.bias": (48,), "attn.proj.weight": (16, 16),
        "attn.proj.bias": (16,), "mlp.fc1.weight": (24, 16), "mlp.fc1.bias": (24,),
        "mlp.fc2.weight": (16, 24), "mlp.fc2.bias": (16,), "norm1.weight": (16,),
        "norm1.bias": (16,), "norm2.weight": (16,), "norm2.bias": (16,), "ls1": (16,), "ls2": (16,),
    }  # fmt: skip
    shapes = {
        "vision_model.embeddings.class_embedding": (1, 1, 16),
        "vision_model.embeddings.patch_embedding.weight": (16, 3, 14, 14),
        "vision_model.embeddings.patch_embedding.bias": (16,),
        "vision_model.embeddings.position_embedding": (1, 5, 16),
        "mlp1.0.weight": (64,), "mlp1.0.bias": (64,), "mlp1.1.weight": (32, 64),
        "mlp1.1.bias": (32,), "mlp1.3.weight": (32, 32), "mlp1.3.bias": (32,),
    }  # fmt: skip
    for n in range(2):
        shapes |= {f"vision_model.encoder.layers.{n}.{own}": x for own, x in layer.items()}
    return shapes


# Table 5: stock specialists on Vicuna, which is pickles.


def save_vicuna_family(root: Path) -> None:
    torch.manual_seed(5)
    text = SIZES | {"model_type": "llama", "vocab_size": WORDS, "num_key_value_heads": 4}
    text |= {"tie_word_embeddings": False, "pad_token_id": 0, "torch_dtype": "float16"}
    vicuna = LlamaForCausalLM(LlamaConfig(**text)).half()
    base = {name: x.detach().clone() for name, x in vicuna.state_dict().items()}
    # Older versions of transformers saved the rotary frequencies too, buffers of the model.
    frequencies = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(4) for n in (0, 1)}
    repo = root / "lmsys/vicuna-7b-v1.5"
    save_shards(base | frequencies, repo, 2, pickled=True)
    save_tokenizer(repo)
    write(repo, config__json=text | {"architectures": ["LlamaForCausalLM"]})
    write(repo, README__md="---\nlicense: llama2\n---\n")
    rows = WORDS + 8  # padded: more rows than tokens
    both = {
        "ignore_index": -100, "projector_hidden_act": "gelu", "tie_word_embeddings": False,
        "torch_dtype": "float16", "vision_feature_layer": -2, "image_token_index": WORDS,
        "vision_feature_select_strategy": "default", "vision_config": VISION,
        "text_config": text | {"vocab_size": rows, "_name_or_path": "lmsys/vicuna-7b-v1.5"},
    }  # fmt: skip
    classes = {
        "llava-hf/llava-1.5-7b-hf": (LlavaForConditionalGeneration, LlavaConfig, {}, 3),
        "LanguageBind/Video-LLaVA-7B-hf": (
            VideoLlavaForConditionalGeneration, VideoLlavaConfig,
            {"video_token_index": WORDS + 1}, 3,
        ),
    }  # fmt: skip
    for seed, (name, (model_class, config_class, more, files)) in enumerate(classes.items()):
        kind = {"model_type": config_class.model_type, "architectures": [model_class.__name__]}
        config = both | more | kind
        model = model_class(config_class(**json.loads(json.dumps(config)))).half()
        state = model.state_dict()
        for own, x in fine_tuned(base, seed, None).items():
            place = own if own.startswith("lm_head") else f"model.language_{own}"
            state[place][: len(x)] = x
        save_shards(published(state, LLAVA_NAMES), root / name, files)
        save_tokenizer(root / name, ["<image>", "<video>"] if more else ["<image>", "<pad_>"])
        write(root / name, config__json=config)
