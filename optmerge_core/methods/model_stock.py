"""Model Stock: as much of the mean as the experts' angles tell is signal (arXiv 2403.19522)."""

import torch
from jaxtyping import Float
from torch import Tensor

from optmerge_core.methods.contract import Stack, check_choice, merge_method


@merge_method()
def model_stock(
    task_vectors: Stack, *, filter_wise: bool = False, rule: str = "paper"
) -> Float[Tensor, "*shape"]:
    """The mean of the task vectors, times t: (experts, *shape) -> (*shape).

    Jang et al., "Model stock: all we need is just a few fine-tuned models" (2024). With cos θ the
    mean cosine of all pairs of k task vectors,

        τm = t · mean τi,    t = k cos θ / (1 + (k − 1) cos θ)

    At λ = 1 that is the published model. t may be negative, and is 0 where the divisor is; the
    cosine with a zero task vector is 0. One expert has no angle: it is itself (t = 1).

    filter_wise     a t for each row along the last dimension, as mergekit does it, or one for all
    rule            "mergekit": where the product of two norms is below 1e-6, it counts as 1e-6
    """
    check_choice("filter_wise", filter_wise, (True, False))
    check_choice("rule", rule, ("paper", "mergekit"))
    count = len(task_vectors)
    if count == 1:
        return task_vectors[0].clone()
    rows = task_vectors if filter_wise and task_vectors.ndim > 1 else task_vectors.flatten(1)
    norms = torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float64)
    least = 1e-6 if rule == "mergekit" else torch.finfo(torch.float64).tiny
    cosines = torch.zeros_like(norms[0])
    for one in range(count):
        for other in range(one + 1, count):
            product = (rows[one] * rows[other]).sum(dim=-1, dtype=torch.float64)
            cosines += (product / (norms[one] * norms[other]).clamp(min=least)).clamp(-1, 1)
    cosine = cosines / (count * (count - 1) / 2)
    divisor = 1 + (count - 1) * cosine
    singular = divisor.abs() < 1e-6
    t = torch.where(singular, 0, count * cosine / torch.where(singular, 1, divisor))
    shape = t.shape if filter_wise else (1,) * (task_vectors.ndim - 2)
    t = t.view(*shape, 1) if task_vectors.ndim > 1 else t
    return (t * task_vectors.mean(dim=0, dtype=torch.float64)).to(task_vectors.dtype)
