"""Base model and experts, opened, and whether they fit: names, shapes, dtypes, from headers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from optmerge_core.checkpoints import HUB_ID
from optmerge_core.checkpoints.formats import CheckpointError, dtype_name
from optmerge_core.checkpoints.layouts import as_laid_out, upright
from optmerge_core.checkpoints.names import is_head, is_stack
from optmerge_core.checkpoints.open import open_checkpoint, open_expert
from optmerge_core.checkpoints.quantised import dequantised
from optmerge_core.checkpoints.weights import Weights, ties
from optmerge_core.merging.checks import notice
from optmerge_core.merging.families import mergeable, merges, unread
from optmerge_core.merging.heads import with_heads
from optmerge_core.merging.processor import Processor, choose, embedding_rows
from optmerge_core.merging.prompting import differences
from optmerge_core.merging.varied import layer_of, stacks
from optmerge_core.runtime import FLOAT_DTYPES


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
    untied: bool = False
    """whether the merged model has a head of its own, which the base's config.json denies"""
    processor: Processor = Processor()


def open_models(
    base_model: str | Path,
    experts: Mapping[str, Any],
    *,
    family: str | None = None,
    scope: str = "linear",
    router: str = "merge",
    stream: bool = False,
    processor: str | Path | None = None,
    chat_template: str | None = None,
    layers: int | None = None,
) -> Opened:
    """Open a base model and its experts (name -> location, model or state dict).

    Reads headers only, but for heads that are stored beside embeddings (scope "all"), and of side
    files what the merged model is prompted by (`processor.choose`).

    Raises `ValueError` (`CheckpointError` for files) for experts that are none of this base.
    """
    base = upright(dequantised(open_checkpoint(base_model, stream=stream)))
    check_config(base, family is not None or scope == "all")
    opened = {
        name: as_laid_out(open_expert(expert, base, stream), base)
        for name, expert in experts.items()
    }
    model_type = family or base.config().get("model_type")
    tied, untied = dict[str, str](), False
    if scope == "all":
        base, opened, tied, untied = with_heads(base, opened)
    names = mergeable(base.shapes(), model_type, scope, router)
    names = [name for name in names if name not in tied]
    names = check_experts(base, opened, names, model_type)
    check_layers(base, names, layers)
    chosen = choose(base, opened, processor, chat_template)
    for text in differences(base, opened, chosen.owner, chosen.folder, chosen.own_template):
        notice(text)
    return Opened(base, opened, names, tied, model_type, untied, chosen)


def check_layers(base: Weights, names: list[str], layers: int | None) -> None:
    """Raise `ValueError` unless a stack of layers of what merges has that many, if it is said."""
    counts = stacks(base)
    found = sorted({counts[stack] for stack, number in map(layer_of, names) if number is not None})
    if layers is not None and layers not in found:
        there = " and ".join(map(str, found)) or "no"
        raise ValueError(
            f"slices: layer_range [0, {layers}] of models that have {there} layers; models cannot "
            "be cut here, list whole ones under models"
        )


def check_config(base: Weights, known: bool = False) -> None:
    """Refuse weights without a config.json, or warn where it is known what merges."""
    if not base.config():
        text = (
            f"{base.folder}: config.json is missing or empty, which says what model this is; copy "
            "it from the model it was trained from"
        )
        if not known:
            raise CheckpointError(text)
        notice(f"{text}, or the merged model does not open")


@dataclass
class _Difference:
    """Where one expert is not like the base: a text for each parameter, in three degrees."""

    problems: list[str] = field(default_factory=list)
    """what the family's rule merges and cannot"""
    kept: dict[str, str] = field(default_factory=dict)
    """what would merge by scope "all": the base's is kept"""
    outside: list[str] = field(default_factory=list)
    dtypes: dict[tuple[torch.dtype, torch.dtype], None] = field(default_factory=dict)
    """(the expert's, the base's), of what merges"""


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
    agreeing = {name for name in names if base.dtype(name) in FLOAT_DTYPES.values()}
    problems = [
        f"{name}: quantised to {dtype_name(base.dtype(name))} in the base"
        for name in names
        if name in ruled and name not in agreeing
    ]
    notices = []
    for name, expert in experts.items():
        found = _compare(base, name, expert, ruled, agreeing, model_type)
        problems += found.problems
        agreeing -= found.kept.keys()
        notices += _notices(base, name, expert, agreeing, found)
    if problems:
        raise ValueError(
            f"{len(problems)} parameters cannot be merged with the base model {base.folder}:\n  "
            + _some(problems, "\n  ")
            + "\nAn expert must be a fine-tuned copy of this base model, saved unquantised: "
            "correct base_model, save the expert again, or leave it out."
        )
    for text in notices:
        notice(text)
    adapted = {n for x in experts.values() for n in (names if x.changes is None else x.changes)}
    agreeing -= {n for n in names if n not in adapted and is_stack(n, base.shape(n))}
    return [name for name in names if name in agreeing]


def _compare(
    base: Weights,
    expert_name: str,
    expert: Weights,
    ruled: set[str],
    agreeing: set[str],
    model_type: str | None,
) -> _Difference:
    found, ours, theirs = _Difference(), base.shapes(), expert.shapes()
    tied, names = ties(base) and ties(expert), sorted({*ours, *theirs})
    spare = unread(names, base.config())
    for name in names:
        if tied and is_head(name) and name not in agreeing:
            continue  # the embeddings, saved twice or once
        match = ours.get(name) == theirs.get(name)
        usable = match and expert.dtype(name) in FLOAT_DTYPES.values()
        differs = (
            f"{name}: expert {expert_name} has {_shape_and_dtype(expert, name)}, "
            f"the base {_shape_and_dtype(base, name)}"
        )
        new = name not in ours and merges(name, theirs[name], model_type)
        if (name in ruled or new) and not usable and name not in spare:
            found.problems.append(differs)
        elif name in agreeing and not usable:
            found.kept[name] = differs
        elif name in agreeing and expert.dtype(name) != base.dtype(name):
            found.dtypes[expert.dtype(name), base.dtype(name)] = None
        elif not match and name not in (expert.changes or ()):  # these have a notice of their own
            found.outside.append(differs)
    return found


def _notices(
    base: Weights, name: str, expert: Weights, agreeing: set[str], found: _Difference
) -> list[str]:
    """What is not refused, but worth a remark."""
    notices = []
    if outside := [own for own in expert.changes or () if own not in agreeing]:
        notices.append(
            f"expert {name} adapts {len(outside)} parameters outside the merge; the base's are "
            f"kept ({outside[0]})"
        )
    named = expert.named_base
    if HUB_ID.fullmatch(named) and named.split("/")[1].lower() not in str(base.folder).lower():
        notices.append(
            f"expert {name} says in adapter_config.json that it is an adapter of {named}; it is "
            f"taken as one of {base.folder}"
        )
    same = [own for own in base if own in expert and is_head(own) == is_head(expert.own_name(own))]
    if renamed := [own for own in same if expert.own_name(own) != own]:
        notices.append(
            f"expert {name} has other names for {len(renamed)} parameters, taken as the base's "
            f"({expert.own_name(renamed[0])} for {renamed[0]})"
        )
    known, rows = embedding_rows(base), embedding_rows(expert)
    if rows > known > 0:
        notices.append(
            f"expert {name} has {rows - known} embeddings more than the base, which the merged "
            "model lacks: prompt it with the base's tokenizer"
        )
    if found.dtypes:
        kinds = "; ".join(_dtype_notice(theirs, ours) for theirs, ours in found.dtypes)
        notices.append(f"expert {name} is stored in {kinds}")
    if found.kept:
        kept = _some(list(found.kept.values()), "; ")
        notices.append(f"{len(found.kept)} parameters keep the base's values: {kept}")
    if found.outside:
        notices.append(
            f"{len(found.outside)} parameters outside the merge differ in name or shape; the "
            f"base's are kept ({found.outside[0]})"
        )
    return notices


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
    remedy = "; dtype='float32' keeps them" if base.dtype != "float32" else ""  # what merges have
    return (
        f"{expert.dtype}, finer than the base's {base.dtype}{rounded}: the merged model has the "
        f"base's, which may round small changes away{remedy}"
    )


def _some(texts: list[str], separator: str, most: int = 20) -> str:
    more = [f"and {len(texts) - most} more"] if len(texts) > most else []
    return separator.join(texts[:most] + more)


def _shape_and_dtype(weights: Weights, name: str) -> str:
    if name not in weights:
        return "no such parameter"
    return f"shape {weights.shape(name)} {dtype_name(weights.dtype(name))}"
