"""Which parameters of which model family merge; all others keep the base model's values.

The paper merges the linear layers of the language model. Vision tower, connector, embeddings,
lm_head, norms and biases are the base's. A parameter merges if its name matches the family's rule
and it is a matrix, so a fused projection (Phi-3's `qkv_proj`, InternLM2's `wqkv`) merges as the one
matrix it is, and so do the matrices of a mixture of experts, be each a parameter of its own or all
in one tensor (`experts.gate_up_proj`, `experts.down_proj`), and its router.

What is a linear layer, where that may be doubted:
- Linear attention and state-space layers (Qwen3.5's `linear_attn`, Nemotron-H's `mixer`): their
  projections merge; `conv1d`, `A_log`, `dt_bias` and `D` are the base's, as no matrices.
- Mllama: the projections of cross-attention merge, which are layers of the language model; its
  gates, single numbers, are the base's.
- Gemma-3n, Gemma-4: LAuReL's two factors, AltUp's coefficients and projections, and the three
  projections of per-layer embeddings merge; these embeddings are the base's.
- Phi-4-multimodal: the published files (`phi4mm`) hold the LoRA by which pictures and speech reach
  the language model; it is part of how these are connected, and the base's. The matrices under it
  (`base_layer`) merge.
- Layers that predict further tokens (`mtp`) are the base's.
- Qwen-Omni: the thinker is the language model. What speaks, `talker` and `token2wav` or `code2wav`,
  is the base's; with the scope "speech" the linear layers in its layers merge as well.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from optmerge_core.checkpoints.names import TOWER, is_stack, routers

SCOPES = ("linear", "speech", "all")
ROUTERS = ("merge", "base")

_LAYER = r"layers\.\d+\..+\.weight"
# The name of the language model differs between the files of the hub, what `save_pretrained` of
# each version of transformers writes, and the modules in memory. The layers of a tower have its
# name before `layers`, and no rule has one.
_FRONT = r"(?:model|(?:model\.)?(?:language_model|text_model)(?:\.model)?)\."
_TEXT, _MULTIMODAL = rf"model\.{_LAYER}", _FRONT + _LAYER
_BESIDE = r"(?:per_layer_model_projection|altup_(?:unembed_)?projections\.\d+)\.weight"
_GEMMA = rf"(?:{_LAYER}|{_BESIDE})"

FAMILIES = dict.fromkeys(
    (
        # files: language_model.model.layers…; in memory: model.language_model.layers…
        *("internvl", "llava", "llava_next", "llava_onevision", "gemma3", "paligemma"),
        *("mistral3", "mllama", "qwen2_audio"),
        "llama4",  # both: language_model.model.layers…
        "internvl_chat",  # InternVL's remote code, with Qwen2, Qwen3, InternLM2, Phi-3 or Llama
        *("llava_llama", "llava_qwen"),  # the authors' own files: model.layers…
        # files: model.layers…; in memory: model.language_model.layers…
        *("qwen2_vl", "qwen2_5_vl"),
        # both: model.language_model.layers…
        *("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "glm4v", "glm4v_moe", "glm46v"),
        *("idefics2", "idefics3", "smolvlm"),  # both: model.text_model.layers…
    ),
    _MULTIMODAL,
) | dict.fromkeys(
    (
        # language models: model.layers…
        *("llama", "mistral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"),
        *("gemma", "gemma2", "gemma3_text", "phi3", "internlm2"),
        *("qwen3_5_text", "qwen3_5_moe_text", "llama4_text"),
    ),
    _TEXT,
)
FAMILIES |= dict.fromkeys(("gemma3n", "gemma4", "gemma4_unified"), _FRONT + _GEMMA)
FAMILIES |= dict.fromkeys(("gemma3n_text", "gemma4_text"), rf"model\.{_GEMMA}")
FAMILIES |= dict.fromkeys(  # files: thinker.model.layers…; the thinker alone: model.layers…
    ("qwen2_5_omni", "qwen2_5_omni_thinker", "qwen3_omni_moe", "qwen3_omni_moe_thinker"),
    rf"(?:thinker\.)?{_MULTIMODAL}",
)
FAMILIES["nemotron_h"] = rf"(?:backbone|model)\.{_LAYER}"  # files: backbone.layers…
FAMILIES |= dict.fromkeys(  # published; of transformers; with towers elsewhere
    ("phi4mm", "phi4_multimodal"), r"model\.layers\.\d+\.(?!.*\blora_).+\.weight"
)
"""config.json's `model_type` -> regular expression of the full names that merge."""

_DEFAULT = rf"(?:.+\.)?{_LAYER}"
_SPEECH = r"(?:talker|token2wav|code2wav)\.(?:.+\.)?(?:layers|transformer_blocks)\.\d+\..+\.weight"
NOT_LANGUAGE = re.compile(rf"{TOWER.pattern}|embed|lora_|(?:^|\.)mtp\.", re.IGNORECASE)
FUSED_EXPERTS = re.compile(r"layers\.\d+\.(?:.+\.)?experts\.\w+$")
_KEYS_AND_VALUES = re.compile(r"layers\.(\d+)\.self_attn\.[kv]_(?:proj|norm)\.")


def mergeable(
    names_and_shapes: Mapping[str, tuple[int, ...]],
    model_type: str | None,
    scope: str = "linear",
    router: str = "merge",
) -> list[str]:
    """Names of the parameters to merge, in the order given.

    `names_and_shapes` maps parameter name to shape, `model_type` is config.json's. With the scope
    "linear", the paper's, these are the linear layers of the language model; with "speech" also
    those of an Omni model's talker and of what makes sound of its codes. An unknown family gets
    a default rule (2-D weights under `layers.<i>.`, and no word like vision, audio or projector in
    the name) and a warning; so do 3-D tensors of a mixture's experts that are not known to be
    matrices, which are the base's. With "all" it is every parameter but scalars and empty ones.
    With the router "base", a mixture's routers keep the base's values in every scope. Raises
    `ValueError` if nothing merges, and for a scope that the checkpoint has nothing of.
    """
    if scope not in SCOPES:
        raise ValueError(f"scope {scope!r}: give 'linear', 'speech' or 'all'")
    if router not in ROUTERS:
        raise ValueError(f"router {router!r}: give 'merge' or 'base'")
    if router == "base":
        kept = routers(names_and_shapes)
        names_and_shapes = {n: shape for n, shape in names_and_shapes.items() if n not in kept}
    if scope == "all":
        names = [name for name, shape in names_and_shapes.items() if shape and 0 not in shape]
        if not names:
            raise ValueError("no parameter to merge: the checkpoint has none with entries")
        return names
    if model_type not in FAMILIES:
        warnings.warn(
            f"model type {model_type!r} has no rule of its own (known: {', '.join(FAMILIES)}): "
            "merging the 2-D weights under layers.<i>. outside vision, audio and projector modules",
            stacklevel=2,
        )
    linear = {name: _as_linear(name, shape) for name, shape in names_and_shapes.items()}
    speech = {name for name, own in linear.items() if re.fullmatch(_SPEECH, own)}
    if scope == "speech" and not speech:
        raise ValueError(
            f"scope 'speech': this checkpoint, of model type {model_type!r}, has no talker, "
            "token2wav or code2wav; give 'linear' or 'all'"
        )
    asked = speech if scope == "speech" else ()
    names = [n for n, own in linear.items() if n in asked or follows_rule(own, model_type)]
    if not names:
        example = next(iter(names_and_shapes), "none at all")
        raise ValueError(
            f"no parameter to merge: model type {model_type!r} merges the 2-D weights named "
            f"{FAMILIES.get(model_type or '', _DEFAULT)}, and this checkpoint has names like "
            f"{example}; is it another model? (scope 'all' merges whatever its names are)"
        )
    known, shapes = speech.union(names), names_and_shapes.items()
    fused = [n for n, x in shapes if len(x) == 3 and FUSED_EXPERTS.search(n) and n not in known]
    if fused:
        warnings.warn(
            f"{len(fused)} tensors of a mixture of experts have no known name and keep the base's "
            f"values ({fused[0]}); scope 'all' merges them",
            stacklevel=2,
        )
    return names


def merges(name: str, shape: tuple[int, ...], model_type: str | None) -> bool:
    """Whether one parameter merges under its family's rule, or the default one."""
    return follows_rule(_as_linear(name, shape), model_type)


def follows_rule(name: str, model_type: str | None) -> bool:
    if model_type in FAMILIES:
        return re.fullmatch(FAMILIES[model_type], name) is not None
    return re.fullmatch(_DEFAULT, name) is not None and not NOT_LANGUAGE.search(name)


def _as_linear(name: str, shape: tuple[int, ...]) -> str:
    """The name as a linear layer has it; empty for what is neither a matrix nor a stack of them."""
    if is_stack(name, shape):  # a parameter, in most classes, and no module's `weight`
        return f"{name.removesuffix('.weight')}.weight"
    return name if len(shape) == 2 else ""


def unread(names: Iterable[str], config: Mapping[str, Any]) -> set[str]:
    """Keys and values of layers that take those of an earlier one (Gemma-3n, Gemma-4).

    Published files have them; transformers 5 neither loads nor saves them.
    """
    text = config.get("text_config") or config
    if not (shared := text.get("num_kv_shared_layers")):
        return set()
    found = {name: _KEYS_AND_VALUES.search(name) for name in names}
    first = text.get("num_hidden_layers", 0) - shared
    return {name for name, match in found.items() if match and int(match[1]) >= first}
