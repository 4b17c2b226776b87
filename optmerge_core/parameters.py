"""Which parameters of which model family merge; all others keep the base model's values.

The paper merges the linear layers of the language model. Vision tower, connector, embeddings,
lm_head, norms and biases are the base's. A parameter merges if its name matches the family's rule
and it is two-dimensional.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping

_LAYER = r"layers\.\d+\..+\.weight"
# Left: names as checkpoints on disk have them (what `save_pretrained` writes, what remote code
# uses). Right: names of the modules in memory, which transformers 5 maps to the former on saving.
_INTERNVL = rf"(?:language_model\.model|model\.language_model)\.{_LAYER}"
_QWEN_VL = rf"(?:model|language_model\.model|model\.language_model)\.{_LAYER}"
_TEXT = rf"model\.{_LAYER}"

FAMILIES = {
    "internvl": _INTERNVL,
    "internvl_chat": _INTERNVL,
    "qwen2_vl": _QWEN_VL,
    "qwen2_5_vl": _QWEN_VL,
    "llama": _TEXT,
    "mistral": _TEXT,
    "qwen2": _TEXT,
    "qwen3": _TEXT,
}
"""config.json's `model_type` -> regular expression of the full names that merge."""

_DEFAULT = rf"(?:.+\.)?{_LAYER}"
_NOT_LANGUAGE = re.compile(
    r"vision|visual|(?:^|[._])vit|image|audio|speech|video|projector|connector|merger|mlp1|resampler|qformer"
    r"|perceiver|abstractor|embed|lora_",
    re.IGNORECASE,
)


def mergeable(names_and_shapes: Mapping[str, tuple[int, ...]], model_type: str | None) -> list[str]:
    """Names of the parameters to merge, in the order given.

    `names_and_shapes` maps parameter name to shape, `model_type` is config.json's. An unknown
    family gets a default rule (2-D weights under `layers.<i>.`, and no word like vision, audio or
    projector in the name) and a warning. Raises `ValueError` if nothing merges.
    """
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
            f"{FAMILIES.get(model_type, _DEFAULT)}, and this checkpoint has names like {example}; "
            "is it another model?"
        )
    return names


def merges(name: str, shape: tuple[int, ...], model_type: str | None) -> bool:
    """Whether one parameter merges under its family's rule, or the default one."""
    if len(shape) != 2:
        return False
    if model_type in FAMILIES:
        return re.fullmatch(FAMILIES[model_type], name) is not None
    return re.fullmatch(_DEFAULT, name) is not None and not _NOT_LANGUAGE.search(name)


def layer_index(name: str) -> int | None:
    """Number of the layer a parameter is in: 3 for `model.layers.3.mlp.up_proj.weight`."""
    match = re.search(r"(?:^|\.)(?:layers?|blocks|h)\.(\d+)\.", name)
    return int(match[1]) if match else None


def module_kind(name: str) -> str:
    """The module's own name: `up_proj` for `model.layers.3.mlp.up_proj.weight`."""
    return re.sub(r"\.(weight|bias)$", "", name).rpartition(".")[2]
