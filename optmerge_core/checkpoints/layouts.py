"""A mixture of experts' matrices in another layout than the base's.

transformers 5 holds a layer's experts in two tensors, `mlp.experts.gate_up_proj` (experts,
2·inner, outer), gates first, and `mlp.experts.down_proj` (experts, outer, inner). It saves them so
(`save_original_format=False`), or as most published files have them, a matrix an expert, by the
words `gate_proj`, `up_proj`, `down_proj` or Mixtral's `w1`, `w3`, `w2`. A few classes hold and save
inputs × outputs. Qwen3-VL-MoE is published so, and turned on loading, but saved as it then is.

A square matrix does not tell how it lies, nor a version in config.json. A block's two tensors tell
it together: gates and ups are twice the inputs of the matrix after them, which is so one way alone.
"""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optmerge_core.checkpoints.formats import CheckpointError
from optmerge_core.checkpoints.names import any_words, is_stack
from optmerge_core.checkpoints.weights import IN_MEMORY, Renamed, Weights

_EXPERTS = re.compile(
    r"(?P<block>.+)\.experts\.(?:(?P<number>\d+)\.(?P<one>\w+)\.weight|(?P<fused>\w+))"
)
_KINDS = {
    **{"w1": ("gate",), "w3": ("up",), "w2": ("down",), "gate_up_proj": ("gate", "up")},
    **{"gate_proj": ("gate",), "up_proj": ("up",), "down_proj": ("down",)},
}
INPUTS_FIRST = {"aria", "aria_text", "gpt_oss", "llama4", "llama4_text", "openai_privacy_filter"}
"""model types whose classes hold and save inputs × outputs"""
EITHER_WAY = {"qwen3_vl_moe", "qwen3_vl_moe_text"}
"""model types that are published as inputs × outputs, and saved as outputs × inputs"""
Key = tuple[str, tuple[str, ...], int | None]
"""Block, kinds of its matrices, and the expert's number; None: of all experts."""


@dataclass(frozen=True)
class _Source:
    """How a tensor of the base's layout is made of an expert's."""

    own: tuple[str, ...]
    shape: tuple[int, ...]
    turned: bool = False
    """with rows and columns exchanged"""
    part: tuple[int, int, int] | None = None
    """of one fused tensor: the expert's number, which share of its rows, of how many"""


def as_laid_out(expert: Weights, base: Weights) -> Weights:
    """The expert with its mixture's matrices under the base's names, in the base's shapes.

    Raises `CheckpointError` for square matrices of which nothing tells how they lie.
    """
    if expert.changes is not None:  # an adapter has its base's
        return expert
    ours, theirs = _Mixture.of(base), _Mixture.of(expert)
    sources = {}
    for key, name in ours.names.items():
        if name in expert and expert.shape(name) == base.shape(name):
            if key[2] is not None or not _turned(key, ours, theirs):
                continue
        find = _one_of if key[2] is not None else _all_of
        if (source := find(key, ours, theirs)) is not None:
            sources[name] = source
    return _relaid(expert, sources)


def upright(base: Weights) -> Weights:
    """The base with its mixture's matrices as outputs × inputs, if transformers reads them so."""
    turned = {name: base.shape(name) for name in inputs_first(base)}
    square = [name for name, (_, rows, columns) in turned.items() if rows == columns]
    if not square or not model_types(base.config()) & EITHER_WAY:
        return base
    warnings.warn(
        f"{base.folder}: {square[0]} has square matrices as inputs × outputs, which transformers 5 "
        "does not turn on loading; the merged model has all of them as outputs × inputs",
        stacklevel=2,
    )
    return _relaid(base, {n: _Source((n,), (x[0], x[2], x[1]), True) for n, x in turned.items()})


def inputs_first(weights: Weights) -> set[str]:
    """Tensors of inputs × outputs; `CheckpointError` where they may be so and nothing tells it."""
    own, types = _Mixture.of(weights), model_types(weights.config())
    ways = {name: own.outputs_last.get(block) for (block, _, _), name in own.names.items()}

    def lies_so(name: str) -> bool:
        if (way := ways.get(name)) is None and types & EITHER_WAY:
            raise _untold(name, weights)
        known = bool(types & INPUTS_FIRST) or name.endswith("_projs")  # NeMo's
        return known if way is None else way

    return {name for name in weights if is_stack(name, weights.shape(name)) and lies_so(name)}


def model_types(config: Mapping[str, Any]) -> set[str]:
    """All that a config.json calls `model_type`, at any depth."""
    inside = (model_types(value) for value in config.values() if isinstance(value, Mapping))
    own = config.get("model_type")
    return set[str]().union(*inside) | ({own} if isinstance(own, str) else set())


class Relaid(Renamed):
    """Weights in another layout. Each tensor is made when it is read, with no other in memory.

    Of a stream the last two fused tensors are kept, of which the next ones are parts.
    """

    def __init__(self, weights: Weights, sources: dict[str, _Source]):
        super().__init__(weights, {name: source.own[0] for name, source in sources.items()})
        self.sources, self._lock = sources, threading.Lock()
        self._recent = lru_cache(maxsize=2)(weights.__getitem__)

    def __getitem__(self, name: str) -> Tensor:
        source = self.sources[name]
        if source.part is not None:
            number, share, shares = source.part
            matrix = self._fused(source.own[0])[number]
            return (matrix.mT if source.turned else matrix).chunk(shares)[share].contiguous()
        if len(source.own) == 1:
            tensor = self.weights[source.own[0]]
            return tensor.mT.contiguous() if source.turned else tensor
        fused = torch.empty(source.shape, dtype=self.dtype(name))
        rows = fused.mT if source.turned else fused
        shares = len(source.own) // len(fused)
        for place, own in enumerate(source.own):
            rows[place // shares].chunk(shares)[place % shares].copy_(self.weights[own])
        return fused

    def _fused(self, own: str) -> Tensor:
        if not self.weights.streamed([own]):
            return self.weights[own]
        with self._lock:
            return self._recent(own)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.sources[name].shape

    def streamed(self, names: Iterable[str]) -> list[tuple[Weights, list[str]]]:
        return self.weights.streamed(
            dict.fromkeys(own for name in names for own in self.sources[name].own)
        )


def mixtures(weights: Weights) -> dict[Key, str]:
    """Key -> the name it has here."""
    found: dict[Key, str] = {}
    for name in weights:
        match = _EXPERTS.fullmatch(any_words(name))
        if match and (kinds := _KINDS.get(match["one"] or match["fused"])):
            number = int(match["number"]) if match["number"] else None
            if len(weights.shape(name)) == (3 if number is None else 2):
                found[f"{match['block']}.experts", kinds, number] = name
    return found


def expert_tensors(block: str, name: str, found: dict[Key, str]) -> tuple[list[str], int]:
    """A tensor of all experts among `mixtures`, or each one's matrices; how many it is of each."""
    kinds, block = _KINDS.get(name, ()), any_words(block)
    fused = found.get((block, kinds, None))
    keys = ((block, (kind,), number) for number in range(len(found)) for kind in kinds)
    own = [fused] if fused else [found[key] for key in takewhile(found.__contains__, keys)]
    return own, len(kinds)


class _Mixture(NamedTuple):
    """The tensors of a mixture's experts."""

    weights: Weights
    names: dict[Key, str]
    """key -> the name it has here"""
    outputs_last: dict[str, bool]
    """block -> whether its matrices are inputs × outputs, where two tensors tell it together"""

    @classmethod
    def of(cls, weights: Weights) -> _Mixture:
        names, ways = mixtures(weights), {}
        for (block, kinds, number), name in names.items():
            after = names.get((block, ("down",), None))
            if number is not None or kinds != ("gate", "up") or after is None:
                continue
            shape, (rows, columns) = weights.shape(name)[1:], weights.shape(after)[1:]
            if shape in ((2 * columns, rows), (columns, 2 * rows)):
                ways[block] = shape == (columns, 2 * rows)
        return cls(weights, names, ways)

    def shape(self, key: Key) -> tuple[int, ...]:
        return self.weights.shape(self.names[key])


def _turned(key: Key, ours: _Mixture, theirs: _Mixture) -> bool:
    """Whether the expert's tensor has rows and columns exchanged; squares alone do not tell."""
    experts, rows, columns = ours.shape(key)
    if theirs.shape(key) != (experts, columns, rows) or rows != columns:
        return theirs.shape(key) == (experts, columns, rows)
    one, other = (x.outputs_last.get(key[0]) for x in (ours, theirs))
    if other is None and model_types(ours.weights.config()) & EITHER_WAY:
        raise _untold(theirs.names[key], theirs.weights)
    return one != other


def _untold(name: str, weights: Weights) -> CheckpointError:
    return CheckpointError(
        f"{weights.folder or IN_MEMORY}: nothing tells whether the matrices of {name} are inputs × "
        "outputs, as published, or turned; give all of the model, experts.down_proj beside them"
    )


def _relaid(weights: Weights, sources: dict[str, _Source]) -> Weights:
    """The weights with these tensors made of theirs, and all that is no part of them."""
    if not sources:
        return weights
    used = {own for source in sources.values() for own in source.own}
    rest = {name: _Source((name,), weights.shape(name)) for name in weights if name not in used}
    return Relaid(weights, rest | sources)


def _one_of(key: Key, ours: _Mixture, theirs: _Mixture) -> _Source | None:
    """One expert's matrix, of the same by other words, or of a fused tensor."""
    block, (kind,), number = key
    assert number is not None
    if key in theirs.names:
        return _Source((theirs.names[key],), theirs.shape(key))
    shape = ours.shape(key)
    for kinds in {kinds for kinds in _KINDS.values() if kind in kinds}:
        if (whole := (block, kinds, None)) not in theirs.names:
            continue
        experts, *matrix = theirs.shape(whole)
        fused = [len(kinds) * shape[0], shape[1]]
        there = [(block, (kind,), n) in ours.names for n in (experts - 1, experts)]
        if there == [True, False] and matrix in (fused, fused[::-1]):
            part = number, kinds.index(kind), len(kinds)
            turned = theirs.outputs_last.get(block, matrix != fused)
            return _Source((theirs.names[whole],), shape, turned, part)
    return None


def _all_of(key: Key, ours: _Mixture, theirs: _Mixture) -> _Source | None:
    """The tensor of all experts, of the same with rows and columns exchanged, or of each one."""
    block, kinds, _ = key
    shape = ours.shape(key)
    if key in theirs.names:
        turned = _turned(key, ours, theirs)
        return _Source((theirs.names[key],), shape if turned else theirs.shape(key), turned)
    wanted = [(block, (kind,), number) for number in range(shape[0]) for kind in kinds]
    more = (block, kinds[:1], shape[0]) in theirs.names
    if more or not all(one in theirs.names for one in wanted):
        return None
    matrices = {theirs.shape(one) for one in wanted}
    rows, columns = matrices.pop()
    fused = (len(kinds) * rows, columns)
    if matrices or shape[1:] not in (fused, fused[::-1]):
        return None
    turned = ours.outputs_last.get(block, shape[1:] != fused)
    return _Source(tuple(theirs.names[one] for one in wanted), shape, turned)
