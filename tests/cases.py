"""Made-up task vectors that several tests share."""

import torch

from optmerge_core.methods import BASED, DRAWN, EXPERTS


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def fitted(method, task_vectors):
    """As many experts as the method is for, and what it takes besides options: base, generators."""
    count = EXPERTS.get(method, len(task_vectors))
    stack = task_vectors[torch.arange(count) % len(task_vectors)]
    more = {"base": randn(*stack.shape[1:], seed=9, dtype=stack.dtype)} if method in BASED else {}
    if method in DRAWN:
        more["generator"] = generators(*range(len(stack)))
    return stack, more


def experts(shape, count=3, seed=0, rank=None, scale=1e-3, dtype=torch.float64):
    """Task vectors with decaying spectra, entries of RMS about `scale`, of `rank` if given."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape
    inner = rank or min(shape)
    left = torch.randn(count, rows, inner, generator=generator, dtype=torch.float64)
    right = torch.randn(count, inner, columns, generator=generator, dtype=torch.float64)
    decay = torch.linspace(1, 0.1, inner, dtype=torch.float64).view(-1, 1)
    product = left @ (decay * right)
    return (product * scale / product.square().mean().sqrt()).to(dtype)


def random(seed: int, scale: float = 1.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(48, 32, generator=generator) for name in NAMES}


def moved(base: dict, *task_vectors: dict, dtype=torch.float32) -> dict[str, torch.Tensor]:
    return {name: (base[name] + sum(t[name] for t in task_vectors)).to(dtype) for name in base}


def with_zero_expert(shape):
    task_vectors = experts(shape)
    task_vectors[1] = 0
    return task_vectors


def distance(result, expected):
    assert result.dtype == expected.dtype and result.shape == expected.shape
    assert result.isfinite().all()
    if expected.norm() == 0:
        return result.norm().item()
    return ((result - expected).norm() / expected.norm()).item()


NAME = "model.layers.1.mlp.up_proj.weight"
NAMES = [f"model.layers.{layer}.mlp.{kind}.weight" for layer in range(3) for kind in ("up", "down")]
SHAPES = {"tall": (4, 30, 8), "wide": (4, 8, 30), "square": (3, 12, 12), "crowded": (5, 9, 3)}
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
DTYPES = list(TOLERANCE)
CASES = {
    "tall": experts((48, 20)),
    "wide": experts((20, 48)),
    "square": experts((32, 32), count=5),
    "rank-deficient": experts((40, 24), rank=3),
    "rank-deficient wide": experts((24, 40), rank=3),
    "one expert": experts((24, 20), count=1),
    "one zero expert": with_zero_expert((24, 20)),
    "more experts than columns": experts((12, 3), count=5),
    "one column": experts((12, 1), count=3),
    "all zero": torch.zeros(3, 6, 4, dtype=torch.float64),
}
