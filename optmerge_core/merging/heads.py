"""A language model's head: its embeddings again, a copy of them in the files, or one of its own.

config.json's `tie_word_embeddings` says that the head is the embeddings. transformers (5.23) does
so where the files have no head or the same values twice; a head of other values it keeps apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from optmerge_core.checkpoints.names import is_embeddings, is_head
from optmerge_core.checkpoints.weights import Renamed, Weights, ties
from optmerge_core.merging.checks import notice


class Heads(NamedTuple):
    """Base and experts with a head each, where any has one of its own under a tied config."""

    base: Weights
    experts: dict[str, Weights]
    tied: dict[str, str]
    """a head that the base stores beside the embeddings it equals -> these"""
    untied: bool
    """whether the heads merge apart, against what config.json says"""


def with_heads(base: Weights, experts: Mapping[str, Weights]) -> Heads:
    """Where one of a tied model's has a head of its own, all get what they load as theirs.

    Reads heads and embeddings that are stored beside each other.
    """
    owners = {"the base": base} | {f"expert {name}": x for name, x in experts.items()}
    found = {owner: _parameters(weights) for owner, weights in owners.items()}
    stored = found["the base"]
    if not ties(base) or stored is None:
        return Heads(base, dict(experts), {}, False)
    own = {
        owner: names[0]
        for owner, names in found.items()
        if names and names[0] and not _equal(owners[owner], names[0], names[1])
    }
    if not own:
        return Heads(base, dict(experts), {stored[0]: stored[1]} if stored[0] else {}, False)
    head = stored[0] or next(iter(own.values()))
    notice(
        f"{' and '.join(own)}: {head} is not the embeddings, which config.json ties it to; the "
        "merged model's is stored apart, and its config.json says so"
    )
    every = {owner: _with_head(x, found[owner], head) for owner, x in owners.items()}
    return Heads(every.pop("the base"), dict(zip(experts, every.values(), strict=True)), {}, True)


def _parameters(weights: Weights) -> tuple[str | None, str] | None:
    """Names of the head, if it is stored, and of the embeddings; None where these are not one."""
    heads = [name for name in weights if is_head(name)]
    embeddings = [name for name in weights if is_embeddings(name)]
    if len(heads) > 1 or len(embeddings) != 1:
        return None
    return heads[0] if heads else None, embeddings[0]


def _equal(weights: Weights, head: str, embeddings: str) -> bool:
    values = weights[embeddings]
    return torch.equal(weights[head].to(values.dtype), values)


def _with_head(weights: Weights, names: tuple[str | None, str] | None, head: str) -> Weights:
    """The same with a head of this name: its own, or else its embeddings."""
    if names is None or names[0] == head:
        return weights
    own, embeddings = names
    rest = {name: name for name in weights if name != own}
    return Renamed(weights, rest | {head: own or embeddings})
