"""What merges of a base model and its experts, decided from headers alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from optmerge_core.checkpoints.formats import HUB_ID, dtype_name
from optmerge_core.checkpoints.open import open_checkpoint, open_expert
from optmerge_core.checkpoints.weights import Weights
from optmerge_core.merging.checks import _notice
from optmerge_core.merging.families import mergeable, merges
from optmerge_core.runtime import FLOAT_DTYPES

HEAD = "lm_head.weight"
EMBEDDINGS = re.compile(r"(?:embed_tokens|tok_embeddings)\.weight$")


@dataclass(frozen=True)
class Opened:
    """Base model and experts, opened: what merging reads."""

    base: Weights
    experts: dict[str, Weights]
    names: list[str]
    """the parameters that merge, in the base's order"""
    tied: dict[str, str]
    """a head that is stored beside the embeddings it equals -> these, whose values it takes"""
    model_type: str | None


def open_models(
    base_model: str | Path,
    experts: Mapping[str, Any],
    *,
    family: str | None = None,
    scope: str = "linear",
    stream: bool = False,
) -> Opened:
    """Open a base model and its experts (name -> location, model or state dict); headers only.

    Raises `ValueError` (`CheckpointError` for files) for experts that are none of this base.
    """
    base = open_checkpoint(base_model, stream=stream)
    opened = {name: open_expert(expert, base, stream) for name, expert in experts.items()}
    model_type = family or base.config().get("model_type")
    tied = tied_head(base) if scope == "all" else {}
    names = [name for name in mergeable(base.shapes(), model_type, scope) if name not in tied]
    names = check_experts(base, opened, names, model_type)
    return Opened(base, opened, names, tied, model_type)


def check_experts(
    base: Weights, experts: Mapping[str, Weights], names: list[str], model_type: str | None
) -> list[str]:
    """The names that merge: `names`, less what only some checkpoints have (scope "all").

    What the family's rule merges must match the base in name and shape, and be unquantised: else
    one `ValueError` lists it. Any other parameter of `names` keeps the base's value where it does
    not match, with a warning that names it. Warnings also tell of experts in another dtype, and of
    parameters outside `names` that differ in name or shape.
    """
    ruled = {n for n in names if merges(n, base.shape(n), model_type)}
    problems = [
        f"{name}: quantised to {dtype_name(base.dtype(name))} in the base"
        for name in names
        if name in ruled and base.dtype(name) not in FLOAT_DTYPES.values()
    ]
    notices, agreeing = [], {name for name in names if base.dtype(name) in FLOAT_DTYPES.values()}
    base_shapes = base.shapes()
    for expert_name, expert in experts.items():
        shapes, dropped, outside, dtypes = expert.shapes(), [], [], {}
        tied = _ties(base) and _ties(expert)
        for name in sorted({*base_shapes, *shapes}):
            if tied and name.endswith(HEAD) and name not in agreeing:
                continue  # the embeddings, saved twice or once
            match = base_shapes.get(name) == shapes.get(name)
            usable = match and expert.dtype(name) in FLOAT_DTYPES.values()
            differs = (
                f"{name}: expert {expert_name} has {_shape_and_dtype(expert, shapes, name)}, "
                f"the base {_shape_and_dtype(base, base_shapes, name)}"
            )
            new = name not in base_shapes and merges(name, shapes[name], model_type)
            if (name in ruled or new) and not usable:
                problems.append(differs)
            elif name in agreeing and not usable:
                dropped.append(differs)
                agreeing.discard(name)
            elif name in agreeing and expert.dtype(name) != base.dtype(name):
                dtypes[expert.dtype(name), base.dtype(name)] = None
            elif not match:
                outside.append(differs)
        changed = [name for name in expert.changes or () if name not in agreeing]
        if changed:
            notices.append(
                f"expert {expert_name} adapts {len(changed)} parameters outside the merge; the "
                f"base's are kept ({changed[0]})"
            )
        named = expert.named_base
        if HUB_ID.fullmatch(named) and named.split("/")[1].lower() not in str(base.folder).lower():
            notices.append(
                f"expert {expert_name} says in adapter_config.json that it is an adapter of "
                f"{named}; it is taken as one of {base.folder}"
            )
        renamed = [n for n in base if n in expert and expert.own_name(n) != n]
        if renamed:
            ours, theirs = renamed[0], expert.own_name(renamed[0])
            notices.append(
                f"expert {expert_name} has other names for {len(renamed)} parameters, taken as the "
                f"base's ({theirs} for {ours})"
            )
        known = _tokens(base_shapes)
        if _tokens(shapes) > known > 0:
            notices.append(
                f"expert {expert_name} has {_tokens(shapes) - known} embeddings more than the "
                "base, which the merged model lacks: prompt it with the base's tokenizer"
            )
        if dtypes:
            kinds = "; ".join(_dtype_notice(theirs, ours) for theirs, ours in dtypes)
            notices.append(f"expert {expert_name} is stored in {kinds}")
        if dropped:
            notices.append(
                f"{len(dropped)} parameters keep the base's values: {_some(dropped, '; ')}"
            )
        if outside:
            notices.append(
                f"{len(outside)} parameters outside the merge differ in name or shape; the base's "
                f"are kept ({outside[0]})"
            )
    if problems:
        raise ValueError(
            f"{len(problems)} parameters cannot be merged with the base model {base.folder}:\n  "
            + _some(problems, "\n  ")
            + "\nAn expert must be a fine-tuned copy of this base model, saved unquantised: "
            "correct base_model, save the expert again, or leave it out."
        )
    for notice in notices:
        _notice(notice)
    return [name for name in names if name in agreeing]


def tied_head(base: Weights) -> dict[str, str]:
    """Head -> embeddings, where config.json ties them and the files hold the same values twice."""
    heads = [name for name in base if name.endswith(HEAD)]
    embeddings = [name for name in base if EMBEDDINGS.search(name)]
    if len(heads) != 1 or len(embeddings) != 1 or not _ties(base):
        return {}
    same = torch.equal(base[heads[0]], base[embeddings[0]])
    return {heads[0]: embeddings[0]} if same else {}


def _ties(checkpoint: Weights) -> bool:
    """Whether the model's head is its embeddings: config.json says so, or says nothing of it."""
    config = checkpoint.config()
    texts = [config.get(key) for key in ("text_config", "llm_config")]
    for part in (config, *(text for text in texts if isinstance(text, dict))):
        if "tie_word_embeddings" in part:
            return bool(part["tie_word_embeddings"])
    return not any(name.endswith(HEAD) for name in checkpoint)


def _tokens(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Rows of the embeddings; 0 where no parameter is named as such."""
    rows = [shape[0] for name, shape in shapes.items() if EMBEDDINGS.search(name) and shape]
    return rows[0] if len(rows) == 1 else 0


def _dtype_notice(theirs: torch.dtype, ours: torch.dtype) -> str:
    """What an expert's dtype means for its task vector, and for the merged model."""
    expert, base = torch.finfo(theirs), torch.finfo(ours)
    if expert.eps > base.eps:
        return (
            f"{expert.dtype}, coarser than the base's {base.dtype}: its task vector has rounding "
            f"noise of up to {50 * expert.eps:.2g} % of each weight; give the base in "
            f"{expert.dtype} too, or the expert as saved in {base.dtype}"
        )
    rounded = (
        f" (but weights below {expert.tiny:.0e} are rounded)" if expert.tiny > base.tiny else ""
    )
    return (
        f"{expert.dtype}, finer than the base's {base.dtype}{rounded}: the merged model has the "
        f"base's, which may round small changes away; dtype='float32' keeps them"
    )


def _some(texts: list[str], separator: str, most: int = 20) -> str:
    more = [f"and {len(texts) - most} more"] if len(texts) > most else []
    return separator.join(texts[:most] + more)


def _shape_and_dtype(checkpoint: Weights, shapes: Mapping[str, tuple[int, ...]], name: str) -> str:
    if name not in shapes:
        return "no such parameter"
    return f"shape {shapes[name]} {dtype_name(checkpoint.dtype(name))}"


def names_to_merge(study, base, experts, scope=None):
    """The parameters that `merge` merges by the recipe's scope (or another), in the files' order.

    base, experts: opened checkpoints. Raises `ValueError` for experts that are none of this base.
    """
    model_type, scope = study.family or base.config().get("model_type"), scope or study.scope
    tied = tied_head(base) if scope == "all" else {}
    names = [name for name in mergeable(base.shapes(), model_type, scope) if name not in tied]
    return check_experts(base, experts, names, model_type)
