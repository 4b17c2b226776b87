"""WUDI and OptMerge: merging by minimising the interference between experts.

Both look for the merged task vector τ that minimises

    loss(τ) = Σi wi ‖(τ − Ti) Liᵀ‖²F,    wi = 1 / ‖τi‖²F                   (Eq. 1 and Eq. 3)

with targets Ti and input subspaces Li. WUDI takes Ti = Li = τi; OptMerge truncates both to low
rank. `interference.py` turns the loss into a quadratic form and descends on it.
Equations: OptMerge (arXiv 2505.19892). Settings: its released code.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from optmerge_core.methods.contract import check_choice, check_share, merge_method
from optmerge_core.methods.interference import OnStep, adam, interference, ridge, sgd
from optmerge_core.methods.svd import low_rank, randomized_low_rank

LOW_RANK = {"exact": low_rank, "randomized": randomized_low_rank}


@dataclass(frozen=True)
class Settings:
    """How the interference is posed and minimised; `optmerge` explains the fields."""

    center: bool
    subspace: str
    init: str
    optimizer: str
    learning_rate: float
    learning_rate_unit: str = "absolute"
    momentum: float = 0.9
    steps: int = 300
    rank_ratio: float | None = None
    shrink: float = 0.1
    svd: str = "exact"

    def __post_init__(self) -> None:
        check_choice("subspace", self.subspace, ("uncentered", "centered", "whole"))
        check_choice("init", self.init, ("sum", "mean", "zero"))
        check_choice("optimizer", self.optimizer, ("adam", "sgd", "ridge"))
        check_choice("svd", self.svd, LOW_RANK)
        check_choice("learning_rate_unit", self.learning_rate_unit, ("absolute", "rms"))
        check_share("momentum", self.momentum, zero=True)
        if self.rank_ratio is not None:
            check_share("rank_ratio", self.rank_ratio)
        if self.learning_rate < 0 or self.steps < 0:
            raise ValueError(
                f"learning_rate {self.learning_rate} and steps {self.steps} must not be negative"
            )
        if self.shrink <= 0:
            raise ValueError(f"shrink is {self.shrink}; it must be positive")


PRESETS = {
    "full": Settings(
        center=True, subspace="uncentered", init="sum", optimizer="adam", learning_rate=1e-5
    ),
    "lora": Settings(
        center=False, subspace="uncentered", init="mean", optimizer="sgd", learning_rate=1e-4
    ),
    "modality": Settings(
        center=False, subspace="whole", init="mean", optimizer="sgd", learning_rate=5e-2,
        rank_ratio=0.2,
    ),
}  # fmt: skip


@merge_method(matrices_only=True)
def wudi(
    task_vectors: Tensor,
    *,
    init: str = "sum",
    optimizer: str = "adam",
    learning_rate: float = 1e-5,
    learning_rate_unit: str = "absolute",
    momentum: float = 0.9,
    steps: int = 300,
    shrink: float = 0.1,
    on_step: OnStep | None = None,
) -> Tensor:
    """WUDI merging, Eq. 1: targets and subspaces are the task vectors, (experts, m, n) -> (m, n).

    Cheng et al., "Whoever started the interference should end it" (2025). The options are those
    of `optmerge`.
    """
    settings = Settings(
        center=False,
        subspace="whole",
        rank_ratio=1.0,
        init=init,
        optimizer=optimizer,
        learning_rate=learning_rate,
        learning_rate_unit=learning_rate_unit,
        momentum=momentum,
        steps=steps,
        shrink=shrink,
    )
    return minimise_interference(task_vectors, settings, on_step)


@merge_method(matrices_only=True)
def optmerge(
    task_vectors: Tensor,
    *,
    preset: str = "full",
    center: bool | None = None,
    subspace: str | None = None,
    init: str | None = None,
    optimizer: str | None = None,
    learning_rate: float | None = None,
    learning_rate_unit: str | None = None,
    momentum: float | None = None,
    steps: int | None = None,
    rank_ratio: float | None = None,
    shrink: float | None = None,
    svd: str | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """OptMerge, Eq. 2–3: (experts, m, n) -> (m, n). An option left at None is the preset's.

    preset              the released code's settings: "full" fine-tuning, "lora" or "modality"
    center              truncate τi − τ̄ and add the mean τ̄ back (Eq. 2), or truncate τi itself
    subspace            Li: ΣVᵀ of "uncentered" τi, ΣVᵀ of "centered" τi − τ̄ (Eq. 3), "whole" τi
    rank_ratio          rank kept, as a share of min(m, n); None in every preset but modality:
                        rank min(m, n) // experts
    init                where the descent starts: "sum" or "mean" of the τi, "zero"
    optimizer           "adam", "sgd" with `momentum`, or, beyond the paper, "ridge" with `shrink`
    learning_rate       as published in "absolute" units; with the learning_rate_unit "rms" it is
                        multiplied by the root mean square of the task vectors' entries, which
                        makes Adam's steps, else in units of weights, follow the weights' size
    steps               number of steps of "adam" or "sgd"
    shrink              weight of ‖τ − start‖²F beside the loss, in mean eigenvalues of C
    svd                 "exact", or "randomized" (a sketch), which is faster for large matrices
    on_step             called with (step, loss, ‖τ‖F) at the start, step 0, and after each step
    """
    check_choice("preset", preset, PRESETS)
    overrides = {
        "center": center,
        "subspace": subspace,
        "init": init,
        "optimizer": optimizer,
        "learning_rate": learning_rate,
        "learning_rate_unit": learning_rate_unit,
        "momentum": momentum,
        "steps": steps,
        "rank_ratio": rank_ratio,
        "shrink": shrink,
        "svd": svd,
    }
    given = {name: value for name, value in overrides.items() if value is not None}
    return minimise_interference(task_vectors, replace(PRESETS[preset], **given), on_step)


def minimise_interference(
    task_vectors: Tensor, settings: Settings, on_step: OnStep | None = None
) -> Tensor:
    """Descend from the start τ0, in the displacement δ = τ − τ0: (experts, m, n) -> (m, n).

    Replacing Ti by Ti − τ0 moves the origin of the quadratic form to τ0. Where the start is
    already optimal the gradient is then exactly 0, not the rounding error of τ0 C − D, which
    Adam would blow up to full steps.
    """
    start = _start(task_vectors, settings.init)
    targets, subspaces = targets_and_subspaces(task_vectors, settings)
    form = interference(task_vectors, targets - start, subspaces)
    learning_rate = settings.learning_rate
    if settings.learning_rate_unit == "rms":
        learning_rate *= task_vectors.square().mean().sqrt().item()
    if settings.optimizer == "ridge":
        return start + ridge(form, start, settings.shrink, on_step)
    if settings.optimizer == "adam":
        return start + adam(form, start, learning_rate, settings.steps, on_step)
    return start + sgd(form, start, learning_rate, settings.momentum, settings.steps, on_step)


def _start(task_vectors: Tensor, init: str) -> Tensor:
    if init == "zero":
        return torch.zeros_like(task_vectors[0])
    return task_vectors.sum(dim=0) if init == "sum" else task_vectors.mean(dim=0)


def targets_and_subspaces(task_vectors: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """Ti (experts, m, n) and Li (experts, k or m, n) of Eq. 2–3 for these settings."""
    experts, smaller_side = len(task_vectors), min(task_vectors.shape[1:])
    ratio = settings.rank_ratio
    rank = max(smaller_side // experts if ratio is None else int(ratio * smaller_side), 1)
    mean = task_vectors.mean(dim=0)

    def truncate(center: bool) -> tuple[Tensor, Tensor]:
        matrices = task_vectors - mean if center else task_vectors
        if rank == smaller_side:
            return matrices, matrices
        return LOW_RANK[settings.svd](matrices, rank)

    targets, subspaces = truncate(settings.center)
    if settings.center:
        targets = targets + mean
    if settings.subspace == "whole":
        subspaces = task_vectors
    elif (settings.subspace == "centered") != settings.center:
        _, subspaces = truncate(not settings.center)
    return targets, subspaces
