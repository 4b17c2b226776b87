"""A mixture of experts' matrices in another layout than the base's.

transformers 5 holds a layer's experts in two tensors, `mlp.experts.gate_up_proj` (experts,
2·inner, outer), gates first, and `mlp.experts.down_proj` (experts, outer, inner). It saves them so
(`save_original_format=False`), or as most published files have them, a matrix an expert, by the
words `gate_proj`, `up_proj`, `down_proj` or Mixtral's `w1`, `w3`, `w2`. Qwen3-VL-MoE's published
tensors are fused with outputs last, and transformers tells them by their shape, as is done here.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile

import torch
from torch import Tensor

from optmerge_core.checkpoints.names import any_words
from optmerge_core.checkpoints.weights import Renamed, Weights

_EXPERTS = re.compile(
    r"(?P<block>.+)\.experts\.(?:(?P<number>\d+)\.(?P<one>\w+)\.weight|(?P<fused>\w+))"
)
_KINDS = {
    **{"w1": ("gate",), "w3": ("up",), "w2": ("down",), "gate_up_proj": ("gate", "up")},
    **{"gate_proj": ("gate",), "up_proj": ("up",), "down_proj": ("down",)},
}
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
    """The expert with its mixture's matrices under the base's names, in the base's shapes."""
    if expert.changes is not None:  # an adapter has its base's
        return expert
    ours, theirs = mixtures(base), mixtures(expert)
    sources = {}
    for key, name in ours.items():
        shape = base.shape(name)
        if name in expert and expert.shape(name) == shape:
            continue
        find = _one_of if key[2] is not None else _all_of
        if (source := find(key, shape, ours, theirs, expert)) is not None:
            sources[name] = source
    if not sources:
        return expert
    used = {own for source in sources.values() for own in source.own}
    rest = {name: _Source((name,), expert.shape(name)) for name in expert if name not in used}
    return Relaid(expert, rest | sources)


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
        match = _EXPERTS.fullmatch(name)
        if match and (kinds := _KINDS.get(match["one"] or match["fused"])):
            block = any_words(f"{match['block']}.experts")
            found[block, kinds, int(match["number"]) if match["number"] else None] = name
    return found


def expert_tensors(block: str, name: str, found: dict[Key, str]) -> tuple[list[str], int]:
    """A tensor of all experts among `mixtures`, or each one's matrices; how many it is of each."""
    kinds, block = _KINDS.get(name, ()), any_words(block)
    fused = found.get((block, kinds, None))
    keys = ((block, (kind,), number) for number in range(len(found)) for kind in kinds)
    own = [fused] if fused else [found[key] for key in takewhile(found.__contains__, keys)]
    return own, len(kinds)


def _one_of(
    key: Key, shape: tuple[int, ...], ours: dict[Key, str], theirs: dict[Key, str], expert: Weights
) -> _Source | None:
    """One expert's matrix, of the same by other words, or of a fused tensor."""
    block, (kind,), number = key
    assert number is not None
    if key in theirs:
        return _Source((theirs[key],), expert.shape(theirs[key]))
    for kinds in {kinds for kinds in _KINDS.values() if kind in kinds}:
        own = theirs.get((block, kinds, None))
        if own is None:
            continue
        experts, *matrix = expert.shape(own)
        fused = [len(kinds) * shape[0], shape[1]]
        there = [(block, (kind,), n) in ours for n in (experts - 1, experts)]
        if there == [True, False] and matrix in (fused, fused[::-1]):
            part = number, kinds.index(kind), len(kinds)
            return _Source((own,), shape, turned=matrix != fused, part=part)
    return None


def _all_of(
    key: Key, shape: tuple[int, ...], ours: dict[Key, str], theirs: dict[Key, str], expert: Weights
) -> _Source | None:
    """The tensor of all experts, of the same with rows and columns exchanged, or of each one."""
    block, kinds, _ = key
    if key in theirs:
        turned = (shape[0], *reversed(shape[1:])) == expert.shape(theirs[key])
        own = theirs[key]
        return _Source((own,), shape if turned else expert.shape(own), turned)
    wanted = [(block, (kind,), number) for number in range(shape[0]) for kind in kinds]
    if not all(one in theirs for one in wanted) or (block, kinds[:1], shape[0]) in theirs:
        return None
    names = tuple(theirs[one] for one in wanted)
    matrices = {expert.shape(name) for name in names}
    rows, columns = matrices.pop()
    fused = (len(kinds) * rows, columns)
    if matrices or shape[1:] not in (fused, fused[::-1]):
        return None
    return _Source(names, shape, turned=shape[1:] != fused)
