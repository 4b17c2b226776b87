"""WUDI in closed form, from the later release of the OptMerge authors (arXiv 2505.19892)."""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from optmerge_core.methods.contract import (
    Matrices,
    Matrix,
    check_choice,
    check_share,
    merge_method,
)
from optmerge_core.methods.interference import interference

PRESETS = {"full": (300.0, 0.65), "lora": (1300.0, 0.01)}
"""exp_time and rank_ratio: the later release's for InternVL2.5-1B, fully fine-tuned, and for
Qwen2-VL-7B, LoRA, there with λ = 0.2."""


@merge_method(matrices_only=True)
def swudi(
    task_vectors: Matrices,
    *,
    preset: str = "full",
    exp_time: float | None = None,
    rank_ratio: float | None = None,
) -> Matrix:
    """Spectral WUDI: gradient flow for `exp_time` on the leading eigenvalues of C.

    f = 1 − exp(−exp_time·Λ) on the largest ⌈rank_ratio·n⌉, else 0; (experts, m, n) -> (m, n).
    What is None is the preset's, "full" or "lora".
    """
    time, ratio = of_preset(preset, exp_time, rank_ratio)
    check_share("rank_ratio", ratio)

    def flow(eigenvalues: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        kept = math.ceil(ratio * len(eigenvalues))
        return -torch.expm1(-time * eigenvalues) * _leading(eigenvalues, kept)

    return _filter_interference(task_vectors, flow)


def of_preset(
    preset: str = "full", exp_time: float | None = None, rank_ratio: float | None = None
) -> tuple[float, float]:
    """exp_time and rank_ratio, the preset's where they are None."""
    check_choice("preset", preset, PRESETS)
    time, ratio = PRESETS[preset]
    return time if exp_time is None else exp_time, ratio if rank_ratio is None else rank_ratio


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
