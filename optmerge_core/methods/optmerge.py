"""OptMerge: the merged task vector that interferes least at low rank (arXiv 2505.19892).

It is the τ that minimises

    loss(τ) = Σi wi ‖(τ − Ti) Liᵀ‖²F,    wi = 1 / ‖τi‖²F                          (Eq. 3)

where targets Ti and input subspaces Li are the task vectors τi truncated to low rank (Eq. 2).
`interference.py` turns the loss into a quadratic form and descends on it. Settings: the released
code's.
"""

from dataclasses import dataclass, fields, replace

from jaxtyping import Float
from torch import Tensor

from optmerge_core.methods.contract import Matrices, Matrix, check_choice, check_share, merge_method
from optmerge_core.methods.interference import Descent, OnStep, fewer_rows, minimise_interference
from optmerge_core.methods.svd import low_rank, row_space


@dataclass(frozen=True, kw_only=True)
class Settings(Descent):
    """How the interference is posed, besides how it is minimised; `optmerge` explains all."""

    center: bool
    subspace: str
    rank_ratio: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("subspace", self.subspace, ("uncentered", "centered", "whole"))
        if self.rank_ratio is not None:
            check_share("rank_ratio", self.rank_ratio)


PRESETS = {
    "full": Settings("sum", "adam", 1e-5, center=True, subspace="uncentered"),
    "lora": Settings("mean", "sgd", 1e-4, center=False, subspace="uncentered"),
    "modality": Settings("mean", "sgd", 5e-2, center=False, subspace="whole", rank_ratio=0.2),
}


@merge_method(matrices_only=True)
def optmerge(
    task_vectors: Matrices,
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
    on_step: OnStep = None,
) -> Matrix:
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
    on_step             called with (step, loss, ‖τ‖F) at the start, step 0, and after each step
    """
    options = locals()
    check_choice("preset", preset, PRESETS)
    names = [field.name for field in fields(Settings) if options[field.name] is not None]
    settings = replace(PRESETS[preset], **{name: options[name] for name in names})
    targets, subspaces = targets_and_subspaces(task_vectors, settings, as_seen=True)
    return minimise_interference(task_vectors, targets, subspaces, settings, on_step)


def targets_and_subspaces(
    task_vectors: Matrices, settings: Settings, *, as_seen: bool = False
) -> tuple[Matrices, Float[Tensor, "experts _ n"]]:
    """Ti (experts, m, n) and Li (experts, k or m, n) of Eq. 2–3 for these settings.

    as_seen: only Ti Liᵀ has to be right. Where both are of one SVD that is τi Liᵀ, as Li does not
    see what is cut off, and nothing needs to be.
    """
    experts, smaller_side = len(task_vectors), min(task_vectors.shape[1:])
    ratio, center = settings.rank_ratio, settings.center
    rank = max(smaller_side // experts if ratio is None else int(ratio * smaller_side), 1)
    whole = rank == smaller_side
    mean = task_vectors.mean(dim=0)

    def matrices(center: bool) -> Matrices:
        return task_vectors - mean if center else task_vectors

    def directions(center: bool) -> Float[Tensor, "experts _ n"]:
        short = fewer_rows(matrices(center))
        return short if whole or short.shape[1] <= rank else row_space(short, rank)

    one_svd = settings.subspace == ("centered" if center else "uncentered")
    if one_svd and as_seen:
        return task_vectors, directions(center)
    targets = subspaces = matrices(center)
    if not whole:
        targets, subspaces = low_rank(targets, rank)
    if center:
        targets = targets + mean
    if settings.subspace == "whole":
        subspaces = task_vectors
    elif not one_svd:
        subspaces = directions(not center)
    return targets, subspaces
