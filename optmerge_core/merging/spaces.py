"""Where the factors of LoRA adapters merge: in their span, in Core Space, or at a given rank.

With B = [B1 … BN] = Q R and Aᵀ = [A1ᵀ … ANᵀ] = P T, every task vector is τi = Q Ki Pᵀ, with a small
core Ki of at most Σ ri rows and columns. A method that only multiplies, adds and decomposes its
task vectors gives Q K Pᵀ, where K is what it gives for the cores: an adapter of rank ≤ Σ ri.
Methods that look at single entries (TIES, DARE, Adam) leave that span, unless the entries are a
core's own; then they hang on the bases Q and P, which a space names.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from optmerge_core.merging.varied import varied
from optmerge_core.methods import BASED, THEN
from optmerge_core.methods.contract import check_choice
from optmerge_core.methods.iso_cts import counts, from_counts
from optmerge_core.methods.optmerge import PRESETS
from optmerge_core.methods.registry import METHODS, calibrated
from optmerge_core.methods.svd import truncated_svd
from optmerge_core.methods.swudi import of_preset

ENTRYWISE = "works on single entries, which leaves the span of the factors"
LEAVING = dict.fromkeys(
    (
        *("ties", "dare_task_arithmetic", "dare_ties", "breadcrumbs", "breadcrumbs_ties"),
        *("della", "della_linear", "sce"),
    ),
    ENTRYWISE,
) | {"aswudi": "counts directions that no expert uses"}
"""Methods that are not possible with factors -> why."""
BY_ROWS = {"model_stock": ("filter_wise", True), "nuslerp": ("flatten", False)}
"""Method -> an option and the value that makes it look at single rows."""
Pair = tuple[Tensor, Tensor]
"""B (outputs, r) and A (r, inputs)."""


@dataclass(frozen=True)
class Space:
    """Where adapters merge; raises `ValueError` for what is none.

    name        "factors": as the whole matrices would. "core": Core Space (Panariello et al., arXiv
                2509.17786, as the released code), where the method works on the cores as on any
                matrices, Q and P being the left singular vectors of [B1 … BN], scales in B, and the
                right ones of the stacked Ai. "compressed": Q and P are only `rank` vectors, the
                leading eigenvectors of Σ τi τiᵀ and Σ τiᵀ τi, and so are the cores' sides
    rank        of the merged adapter, for "compressed" alone
    spectrum    of the merged small matrix: "kept", or "even": all singular values are the mean of
                its own, Σ ri in Core Space and not min(m, n); those of no direction stay 0

    "compressed" is from the abstract of "Compress then merge" (He et al., arXiv 2606.03723): shared
    subspaces of r dimensions, from the adapters alone, then a merge of r × r coordinates. Which
    subspaces the paper takes is not known here; these keep most of the experts' energy on either
    side, whichever way a product is split into factors.
    """

    name: str = "factors"
    rank: int | None = None
    spectrum: str = "kept"

    def __post_init__(self) -> None:
        check_choice("space", self.name, ("factors", "core", "compressed"))
        check_choice("spectrum", self.spectrum, ("kept", "even"))
        whole = isinstance(self.rank, int) and not isinstance(self.rank, bool) and self.rank > 0
        if self.name == "compressed" and not whole:
            raise ValueError(
                f"rank is {self.rank!r}; space='compressed' needs that of the merged adapter, a "
                "whole number of at least 1"
            )
        if self.name != "compressed" and self.rank is not None:
            raise ValueError(f"rank is for space='compressed'; leave it out of {self.name!r}")
        if self.name == "factors" and self.spectrum == "even":
            raise ValueError(
                "spectrum='even' is for the spaces 'core' and 'compressed'; give one of them"
            )

    def rank_of(self, ranks: int, shape: tuple[int, ...]) -> int:
        """The rank of a merged layer, from the experts' together and (outputs, inputs)."""
        return min(ranks, *shape, *([] if self.rank is None else [self.rank]))


FACTORS = Space()


def check_possible(method: str, options: Mapping[str, Any], space: Space = FACTORS) -> None:
    """Raise `ValueError` for a method whose result is not an adapter."""
    reason, remedy = None, "use merge with a base model"
    if varied(options):
        reason = "by layer or filter asks how many layers there are, which no adapter tells"
    elif method in BASED and (method != "nuslerp" or options.get("of") == "weights"):
        reason = "needs the base's own matrix"
    elif space.name == "factors":
        reason, remedy = _leaving(method, options), f"{remedy}, or space='core'"
    if reason:
        raise ValueError(f"{method} {reason}: its result is no adapter; {remedy}")


def _leaving(method: str, options: Mapping[str, Any]) -> str | None:
    """Why what it gives for the cores is not what it gives for whole matrices; None if it is."""
    if method in ("optmerge", "wudi"):
        preset = (
            PRESETS[options.get("preset", "lora")].optimizer if method == "optmerge" else "adam"
        )
        if options.get("optimizer", preset) == "adam":
            return f"with Adam {ENTRYWISE}; use optimizer='sgd' or 'ridge'"
    if options.get("null_directions") == "fill":
        return "with null_directions='fill' leaves the span of the factors"
    name, value = BY_ROWS.get(method, ("", None))
    if name and options.get(name) == value:
        return f"with {name}={value} works on single rows, which leaves the span of the factors"
    return LEAVING.get(method)


def merge_factors(
    pairs: list[Pair | None],
    method: str,
    options: Mapping[str, Any],
    scaling_coefficient: float,
    shape: tuple[int, ...],
    space: Space = FACTORS,
) -> Pair:
    """One layer: factors (B, A) of every expert (None: not adapted) -> factors of the merged one.

    shape: (outputs, inputs). Returns (outputs, r), (r, inputs) float32, with r the smaller side of
    the cores; computed in float64.
    """
    Q, P, cores = _cores(pairs, space)
    if space.name == "factors":
        merged = merge_cores(cores, method, options, shape)
    else:
        merged = METHODS[method](cores, **options)
    if space.spectrum == "even":
        merged = METHODS["iso_c"](merged.unsqueeze(0))
    merged = scaling_coefficient * merged
    if len(merged) < merged.shape[1]:
        return Q.float(), (merged @ P.mT).float()
    return (Q @ merged).float(), P.mT.float()


def _cores(pairs: list[Pair | None], space: Space) -> tuple[Tensor, Tensor, Tensor]:
    """Q (outputs, p), P (inputs, q) and the cores (experts, p, q), float64."""
    given = [pair for pair in pairs if pair is not None]
    Q, R = torch.linalg.qr(torch.cat([b for b, _ in given], dim=1).double())
    P, T = torch.linalg.qr(torch.cat([a for _, a in given]).double().mT)
    if space.name == "core":
        (Q, R), (P, T) = _by_singular_vectors(Q, R), _by_singular_vectors(P, T)
    cores, start = R.new_zeros(len(pairs), len(R), len(T)), 0
    for core, pair in zip(cores, pairs, strict=True):
        if pair is not None:
            end = start + len(pair[1])
            core.copy_(R[:, start:end] @ T[:, start:end].mT)
            start = end
    if space.name == "compressed":
        U, _, _ = truncated_svd(torch.cat([*cores], dim=1), space.rank)
        _, _, Vh = truncated_svd(torch.cat([*cores]), space.rank)
        Q, P, cores = Q @ U, P @ Vh.mT, U.mT @ cores @ Vh.mT
    return Q, P, cores


def _by_singular_vectors(Q: Tensor, R: Tensor) -> Pair:
    """Q R with its left singular vectors as the first factor; where it has none, R is 0."""
    U, S, Vh = torch.linalg.svd(R, full_matrices=False)
    floor = S.amax() * max(R.shape) * torch.finfo(S.dtype).eps
    return Q @ U, torch.where(floor < S, S, 0).unsqueeze(1) * Vh


def product_norm(b: Tensor, a: Tensor) -> float:
    """Frobenius norm of B A, of (outputs, r) and (r, inputs), in float64, without making it."""
    b, a = b.double(), a.double()
    return ((b.mT @ b) * (a @ a.mT)).sum().clamp(min=0).sqrt().item()


def merge_cores(
    cores: Tensor, method: str, options: Mapping[str, Any], shape: tuple[int, ...]
) -> Tensor:
    """METHODS[method] of the cores (experts, p, q), with its settings those of the whole `shape`.

    What a method takes from the shape (a share of the rank, a mean over all singular values or all
    entries) is translated; nothing else depends on it, and not what follows the method either.
    """
    options = dict(options)
    then = options.pop(THEN, None)
    return calibrated(then, method, _merged_cores(cores, method, options, shape), cores)


def _merged_cores(
    cores: Tensor, method: str, options: dict[str, Any], shape: tuple[int, ...]
) -> Tensor:
    """The same without what follows."""
    experts, small, whole = len(cores), min(cores.shape[1:]), min(shape)
    most = max(whole // experts, 1)
    if method == "iso_c":
        merged = METHODS[method](cores, **options)
        over_all = options.get("mean_over", "all") == "all"  # singular values, most of them 0
        return merged * small / whole if over_all else merged
    if method == "iso_cts" and options.get("size", "all") == "all":
        ratio = options.get("common_ratio", _default(method, "common_ratio"))
        return from_counts(cores, *counts(whole, experts, ratio), whole)
    if method == "tsv":  # it keeps small // experts directions of each: no fewer than there are
        return _padded(cores, experts * min(most, small), method, options)
    if method == "dc_merge":  # the spectrum hangs on whether an expert has that many directions
        rank = options.get("rank")
        options["rank"] = min(most if rank is None else rank, whole)
        return _padded(cores, options["rank"], method, options)
    if method == "swudi":
        kept = math.ceil(of_preset(**options)[1] * shape[1])
        options["rank_ratio"] = min(1.0, (kept - 0.5) / cores.shape[2])
    if method in ("optmerge", "ssam"):
        ratio = options.get("rank_ratio")
        if ratio is None and method == "optmerge":
            ratio = PRESETS[options["preset"]].rank_ratio
        kept = most if ratio is None else max(int(ratio * whole), 1)
        options["rank_ratio"] = min(1.0, (kept + 0.5) / small)
        if method == "ssam" and shape[0] < shape[1]:  # whose outputs are the smaller side
            return METHODS[method](cores.mT, **options).mT
    if options.get("optimizer") == "ridge":  # the penalty is in eigenvalues, averaged over all n
        shrink = options.get("shrink", PRESETS["lora"].shrink)
        options["shrink"] = shrink * cores.shape[2] / shape[1]
    if options.get("learning_rate_unit") == "rms":
        entries = cores[0].numel() / math.prod(shape)
        published = PRESETS[options.get("preset", "full")].learning_rate  # wudi's is full's
        options["learning_rate"] = options.get("learning_rate", published) * entries**0.5
    return METHODS[method](cores, **options)


def _padded(cores: Tensor, side: int, method: str, options: dict[str, Any]) -> Tensor:
    """By the method, with zeros beside the cores where their smaller side is below `side`."""
    missing = max(side - min(cores.shape[1:]), 0)
    padded = METHODS[method](pad(cores, (0, missing, 0, missing)), **options)
    return padded[: cores.shape[1], : cores.shape[2]]


def _default(method: str, option: str) -> Any:
    return inspect.signature(METHODS[method]).parameters[option].default
