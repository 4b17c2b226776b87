"""Which parameters of which model family merge; all others keep the base model's values.

The paper merges the linear layers of the language model. Vision tower, connector, embeddings,
lm_head, norms and biases are the base's. A parameter merges if its name matches the family's rule
and it is a matrix, so a fused projection (Phi-3's `qkv_proj`, InternLM2's `wqkv`) merges as the one
matrix it is, and so do the matrices of a mixture of experts, be each a parameter of its own or all
in one tensor (`experts.gate_up_proj`, `experts.down_proj`), and its router.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping

from optmerge_core.checkpoints.names import TOWER, is_stack, routers

SCOPES = ("linear", "all")
ROUTERS = ("merge", "base")

_LAYER = r"layers\.\d+\..+\.weight"
_TEXT = rf"model\.{_LAYER}"
# The name of the language model differs between the files of the hub, what `save_pretrained` of
# each version of transformers writes, and the modules in memory. The layers of a tower have its
# name before `layers`, and no rule has one.
_MULTIMODAL = rf"(?:model|(?:model\.)?(?:language_model|text_model)(?:\.model)?)\.{_LAYER}"

FAMILIES = dict.fromkeys(
    (
        # files: language_model.model.layers…; in memory: model.language_model.layers…
        *("internvl", "llava", "llava_next", "llava_onevision", "gemma3", "paligemma"),
        "internvl_chat",  # InternVL's remote code, with Qwen2, InternLM2, Phi-3 or Llama
        *("llava_llama", "llava_qwen"),  # the authors' own files: model.layers…
        # files: model.layers…; in memory: model.language_model.layers…
        *("qwen2_vl", "qwen2_5_vl"),
        *("qwen3_vl", "qwen3_vl_moe"),  # both: model.language_model.layers…
        *("idefics2", "idefics3", "smolvlm"),  # both: model.text_model.layers…
    ),
    _MULTIMODAL,
) | dict.fromkeys(
    (
        # language models: model.layers…
        *("llama", "mistral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"),
        *("gemma", "gemma2", "gemma3_text", "phi3", "internlm2"),
    ),
    _TEXT,
)
"""config.json's `model_type` -> regular expression of the full names that merge."""

_DEFAULT = rf"(?:.+\.)?{_LAYER}"
NOT_LANGUAGE = re.compile(rf"{TOWER.pattern}|embed|lora_", re.IGNORECASE)
FUSED_EXPERTS = re.compile(r"layers\.\d+\.(?:.+\.)?experts\.\w+$")


def mergeable(
    names_and_shapes: Mapping[str, tuple[int, ...]],
    model_type: str | None,
    scope: str = "linear",
    router: str = "merge",
) -> list[str]:
    """Names of the parameters to merge, in the order given.

    `names_and_shapes` maps parameter name to shape, `model_type` is config.json's. With the scope
    "linear", the paper's, these are the linear layers of the language model. An unknown family gets
    a default rule (2-D weights under `layers.<i>.`, and no word like vision, audio or projector in
    the name) and a warning; so do 3-D tensors of a mixture's experts that are not known to be
    matrices, which are the base's. With "all" it is every parameter but scalars and empty ones.
    With the router "base", a mixture's routers keep the base's values in either scope. Raises
    `ValueError` if nothing merges.
    """
    if scope not in SCOPES:
        raise ValueError(f"scope {scope!r}: give 'linear' or 'all'")
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
    names = [name for name, shape in names_and_shapes.items() if merges(name, shape, model_type)]
    if not names:
        example = next(iter(names_and_shapes), "none at all")
        raise ValueError(
            f"no parameter to merge: model type {model_type!r} merges the 2-D weights named "
            f"{FAMILIES.get(model_type or '', _DEFAULT)}, and this checkpoint has names like "
            f"{example}; is it another model? (scope 'all' merges whatever its names are)"
        )
    merging, shapes = set(names), names_and_shapes.items()
    fused = [n for n, x in shapes if len(x) == 3 and FUSED_EXPERTS.search(n) and n not in merging]
    if fused:
        warnings.warn(
            f"{len(fused)} tensors of a mixture of experts have no known name and keep the base's "
            f"values ({fused[0]}); scope 'all' merges them",
            stacklevel=2,
        )
    return names


def merges(name: str, shape: tuple[int, ...], model_type: str | None) -> bool:
    """Whether one parameter merges under its family's rule, or the default one."""
    if is_stack(name, shape):  # a parameter, in most classes, and no module's `weight`
        return follows_rule(f"{name.removesuffix('.weight')}.weight", model_type)
    return len(shape) == 2 and follows_rule(name, model_type)


def follows_rule(name: str, model_type: str | None) -> bool:
    if model_type in FAMILIES:
        return re.fullmatch(FAMILIES[model_type], name) is not None
    return re.fullmatch(_DEFAULT, name) is not None and not NOT_LANGUAGE.search(name)
