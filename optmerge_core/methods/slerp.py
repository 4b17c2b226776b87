"""SLERP and NuSLERP: along the arc between two models, or their task vectors (arXiv 2403.13257)."""

import torch
from jaxtyping import Float
from torch import Tensor

from optmerge_core.methods.contract import Stack, Weights, check_choice, merge_method, per_expert

LINEAR = 0.9995
"""The cosine beyond which `slerp` takes the straight line, which the arc then is."""


@merge_method()
def slerp(
    task_vectors: Stack, *, base: Float[Tensor, "*shape"], t: float = 0.5
) -> Float[Tensor, "*shape"]:
    """From the base (t = 0) to the one expert (t = 1): (1, *shape), (*shape) -> (*shape).

    mergekit's (Goddard et al., "Arcee's MergeKit", 2024): with θ the angle between the base θ0 and
    the expert θ1, each as one long vector,

        θ0 + τm = (sin((1 − t) θ) θ0 + sin(t θ) θ1) / sin θ

    and (1 − t) θ0 + t θ1 where |cos θ| is above `LINEAR`. Fine-tuned models are that close to their
    base. At λ = 1 the model is mergekit's. Angles are computed in float64.
    """
    task_vector = task_vectors[0]
    expert = base + task_vector
    norms = [torch.linalg.vector_norm(x, dtype=torch.float64) for x in (base, expert)]
    norms = [torch.where(norm > 1e-8, norm, 1) for norm in norms]
    cosine = (base.double() * expert.double()).sum() / norms[0] / norms[1]
    t_base, t_expert = 1 - t, t
    if cosine.abs() <= LINEAR:
        angle = torch.acos(cosine)
        t_base = (torch.sin((1 - t) * angle) / torch.sin(angle)).item()
        t_expert = (torch.sin(t * angle) / torch.sin(angle)).item()
    return (t_base + t_expert - 1) * base + t_expert * task_vector


@merge_method()
def nuslerp(
    task_vectors: Stack,
    *,
    base: Float[Tensor, "*shape"] | None = None,
    weights: Weights = None,
    of: str = "task_vectors",
    flatten: bool = True,
    row_wise: bool = False,
) -> Float[Tensor, "*shape"]:
    """The arc between two experts: (2, *shape) -> (*shape), times λ.

    mergekit's (Goddard et al., "Arcee's MergeKit", 2024): as `slerp`, with t the second's share of
    the `weights` (1/2 without), and no threshold: a straight line where both have one direction.

    of              what is between: their "task_vectors", or "weights", which the base is needed
                    for: mergekit's choice where a file has a base_model, and where it has none
    flatten         the angle is one of all entries; if not, one for the vectors along the last
                    dimension, or with `row_wise` along the first
    """
    check_choice("of", of, ("task_vectors", "weights"))
    start: Tensor | None = base if of == "weights" else None
    if of == "weights" and start is None:
        raise ValueError("nuslerp of weights needs base, the base's own tensor")
    first, second = task_vectors if start is None else start + task_vectors
    shares = per_expert("weights", 1.0 if weights is None else weights, 2)
    t = 0.5 if abs(sum(shares)) < 1e-6 else shares[1] / sum(shares)
    merged = _arc(t, first, second, None if flatten else 0 if row_wise else -1)
    return merged if start is None else merged - start


def _arc(
    t: float, first: Float[Tensor, "*shape"], second: Float[Tensor, "*shape"], dim: int | None
) -> Float[Tensor, "*shape"]:
    """From `first` to `second`, by one angle (dim None), or one for each vector along `dim`."""
    along = tuple(range(first.ndim)) if dim is None else dim
    norms = [torch.linalg.vector_norm(x.double(), dim=along, keepdim=True) for x in (first, second)]
    product = (first.double() * second.double()).sum(dim=along, keepdim=True)
    lengths = norms[0] * norms[1]
    cosine = (product / torch.where(lengths > 0, lengths, 1)).clamp(-1, 1)
    straight = 1 - cosine.square() <= 1e-15  # what float64 resolves
    angle = torch.acos(torch.where(straight, 0, cosine))
    shares = [torch.sin(s * angle) / torch.sin(angle) for s in (1 - t, t)]
    own, other = (torch.where(straight, s, x) for s, x in zip((1 - t, t), shares, strict=True))
    return (own * first + other * second).to(first.dtype)
