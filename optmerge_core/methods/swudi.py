"""WUDI in closed form, from the later release of the OptMerge authors (arXiv 2505.19892)."""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from optmerge_core.methods.contract import Matrices, Matrix, check_share, merge_method
from optmerge_core.methods.interference import interference


@merge_method(matrices_only=True)
def swudi(task_vectors: Matrices, *, exp_time: float = 300.0, rank_ratio: float = 0.65) -> Matrix:
    """Spectral WUDI: gradient flow for `exp_time` on the leading eigenvalues of C.

    f = 1 − exp(−exp_time·Λ) on the largest ⌈rank_ratio·n⌉, else 0; (experts, m, n) -> (m, n).
    """
    check_share("rank_ratio", rank_ratio)

    def flow(eigenvalues: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        kept = math.ceil(rank_ratio * len(eigenvalues))
        return -torch.expm1(-exp_time * eigenvalues) * _leading(eigenvalues, kept)

    return _filter_interference(task_vectors, flow)


@merge_method(matrices_only=True)
def aswudi(task_vectors: Matrices) -> Matrix:
    """Adaptive spectral WUDI: the exact minimum on the K leading eigenvalues of C.

    f = 1 on the largest K = ⌈(Σ √Λ)² / Σ Λ⌉, else 0; (experts, m, n) -> (m, n).
    """

    def minimum(eigenvalues: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        kept = math.ceil(eigenvalues.sqrt().sum() ** 2 / eigenvalues.sum())
        return _leading(eigenvalues, kept)

    return _filter_interference(task_vectors, minimum)


def _leading(eigenvalues: Float[Tensor, " n"], count: int) -> Float[Tensor, " n"]:
    """1 for the first `count` of the descending eigenvalues, else 0."""
    return (torch.arange(len(eigenvalues), device=eigenvalues.device) < count).double()


def _filter_interference(
    task_vectors: Matrices, spectral_filter: Callable[[Tensor], Tensor]
) -> Matrix:
    """S − S V f Vᵀ + D V (f/Λ) Vᵀ, with S = Σ τi and C = V Λ Vᵀ, Λ clamped at 1e-8.

    From the OptMerge authors' later release. In float64: eigenvalues down to 1e-8 divide.
    """
    form = interference(*3 * [task_vectors.double()])
    S = task_vectors.sum(dim=0, dtype=torch.float64)
    eigenvalues, V = torch.linalg.eigh(form.C)
    eigenvalues, V = eigenvalues.flip(0).clamp(min=1e-8), V.flip(1)
    f = spectral_filter(eigenvalues)
    merged: Tensor = S + (form.D @ V / eigenvalues - S @ V) * f @ V.mT
    return merged.to(task_vectors.dtype)
