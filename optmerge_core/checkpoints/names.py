"""The same parameter under another name: on disk, in memory, in another version of transformers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable

_HALVES = {"model", "language_model", "text_model", "vision_model"}

_PREFIX = r"(?:model\.|language_model\.)*"
_LANGUAGE = re.compile(_PREFIX + r"(layers\.\d+\..+|embed_tokens\.weight|norm\.weight)")
_HEAD = re.compile(_PREFIX + r"lm_head\.weight")
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def closest_names(name: str, candidates: Iterable[str]) -> list[str]:
    """Those of the candidates that may be the same parameter, on disk or in memory.

    Names differ at the front (`language_model.model.layers.0…` on disk,
    `model.language_model.layers.0…` in memory), so the longest common end decides, down to the
    layer's number at least; then the number of common words.
    """
    path = name.split(".")
    least = next((i for i, part in enumerate(reversed(path), 1) if part.isdigit()), 2)
    ranked: dict[tuple[int, int], list[str]] = {}
    for candidate in candidates:
        parts = candidate.split(".")
        common = 0
        for ours, theirs in zip(reversed(path), reversed(parts), strict=False):
            if ours != theirs:
                break
            common += 1
        if common >= least:
            ranked.setdefault((common, len(set(path) & set(parts))), []).append(candidate)
    return ranked[max(ranked)] if ranked else []


def other_names(ours: Collection[str], theirs: Collection[str]) -> dict[str, str]:
    """Our name -> their name, for the parameters that only another naming keeps apart.

    Versions of transformers write `language_model.model.layers.0…` or
    `model.language_model.layers.0…` for the same module. Names that both have stay; the others are
    the same if they are equal without the words for the whole model and its two halves, and no
    third name is.
    """

    def unique(names: Collection[str], but: Collection[str]) -> dict[tuple[str, ...], str]:
        bare = {name: tuple(x for x in name.split(".") if x not in _HALVES) for name in names}
        times = Counter(bare.values())
        return {key: name for name, key in bare.items() if times[key] == 1 and name not in but}

    their_names = unique(theirs, ours)
    return {
        name: their_names[key] for key, name in unique(ours, theirs).items() if key in their_names
    }


def layer_index(name: str) -> int | None:
    """Number of the layer a parameter is in: 3 for `model.layers.3.mlp.up_proj.weight`."""
    match = re.search(r"(?:^|\.)(?:layers?|blocks|h)\.(\d+)\.", name)
    return int(match[1]) if match else None


def module_kind(name: str) -> str:
    """The module's own name: `up_proj` for `model.layers.3.mlp.up_proj.weight`."""
    return re.sub(r"\.(weight|bias)$", "", name).rpartition(".")[2]


def language_name(name: str) -> str | None:
    """A parameter's name in the language model's own checkpoint; None for a tower's."""
    if match := _LANGUAGE.fullmatch(name):
        return f"model.{match[1]}"
    return HEAD if _HEAD.fullmatch(name) else None
