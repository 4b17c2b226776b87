"""OrthoMerge by hand, against the paper's formulas, and where rotations are not determined."""

import math

import pytest
import reference_methods as reference
import torch
from cases import distance, experts, randn

from optmerge_core.methods.orthomerge import orthomerge


def turn(degrees):
    angle = math.radians(degrees)
    values = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
    return torch.tensor(values, dtype=torch.float64)


def test_orthomerge_by_hand():
    """Turns by ±a have tan(a/2) in their Cayley transforms: 60° and 0° add up to tan 15° halved."""
    base = torch.eye(2, dtype=torch.float64)
    task_vectors = torch.stack([turn(60) - base, turn(0) - base])
    half = math.degrees(2 * math.atan(math.tan(math.radians(30)) / 2))
    torch.testing.assert_close(base + orthomerge(task_vectors, base=base), turn(half))
    both = torch.stack([turn(60) - base, turn(60) - base])
    torch.testing.assert_close(base + orthomerge(both, base=base), turn(60))
    opposite = torch.stack([turn(60) - base, turn(-60) - base])
    torch.testing.assert_close(base + orthomerge(opposite, base=base), base)


def test_what_no_rotation_makes_is_merged_apart():
    """A longer expert: W1 = 1.5 W0 R1, so 0.5 W0 R1 is left, of which residual_scale is added."""
    base = torch.eye(2, dtype=torch.float64)
    task_vectors = (1.5 * turn(40) - base)[None]
    for scale in (0.2, 1.0):
        merged = base + orthomerge(task_vectors, base=base, residual_scale=scale)
        torch.testing.assert_close(merged, (1 + 0.5 * scale) * turn(40))


@pytest.mark.parametrize("shape", [(24, 12), (16, 16), (12, 24)])
@pytest.mark.parametrize("scale", [1e-2, 0.1])
def test_orthomerge_equals_the_reference(shape, scale):
    base, task_vectors = 4 * torch.eye(*shape).double(), experts(shape, scale=scale)
    base += randn(*shape, seed=5, dtype=torch.float64)  # far from one that reflections lead to
    turned = shape[0] < shape[1]
    matrices = (task_vectors.mT, base.mT) if turned else (task_vectors, base)
    expected = reference.orthomerge(*matrices)
    expected = expected.mT if turned else expected
    assert distance(orthomerge(task_vectors, base=base), expected) < 1e-6
    single = orthomerge(task_vectors.float(), base=base.float())
    assert distance(single.double(), expected) < 1e-3
    if not turned:
        merged = orthomerge(task_vectors, base=base, side="inputs")
        assert distance(merged, expected) < 1e-6


def test_of_a_wide_matrix_the_inputs_may_turn():
    """W0ᵀ Wi of rank m: what it leaves open stays, so that W0 Ri is as near to Wi as can be."""
    base = randn(4, 9, seed=5, dtype=torch.float64)
    task_vectors = experts((4, 9), count=1, scale=0.1)
    merged = orthomerge(task_vectors, base=base, side="inputs", residual_scale=0.0)
    U, _, Vh = torch.linalg.svd(base.T @ (base + task_vectors[0]))
    assert distance(base + merged, base @ U[:, :4] @ Vh[:4]) < 1e-6
    assert distance((base + merged) @ (base + merged).T, base @ base.T) < 1e-6


@pytest.mark.parametrize("residual", ["task_arithmetic", "ties", "tsv"])
def test_residuals_merge_by_the_method_named(residual):
    base, task_vectors = randn(12, 8, dtype=torch.float64), experts((12, 8), scale=0.1)
    parts = [
        orthomerge(task_vectors, base=base, residual=residual, residual_scale=scale)
        for scale in (0.0, 0.2, 1.0)
    ]
    torch.testing.assert_close(parts[1], 0.8 * parts[0] + 0.2 * parts[2])
    assert not torch.allclose(parts[0], parts[1])


def test_without_residuals_lengths_are_the_bases():
    base, task_vectors = randn(12, 8, dtype=torch.float64), experts((12, 8), scale=0.2)
    merged = base + orthomerge(task_vectors, base=base, residual_scale=0.0)
    torch.testing.assert_close(torch.linalg.svdvals(merged), torch.linalg.svdvals(base))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_what_has_no_rotation_turns_nothing(dtype):
    """A base of zeros, an expert at the base, half a turn, and a base of low rank."""
    task_vectors = experts((12, 8), scale=0.1, dtype=dtype)
    zeros = torch.zeros(12, 8, dtype=dtype)
    torch.testing.assert_close(orthomerge(task_vectors, base=zeros), 0.2 * task_vectors.sum(0))
    base = randn(12, 8, dtype=dtype)
    alone = orthomerge(torch.stack([task_vectors[0], zeros]), base=base, residual_scale=0.0)
    assert alone.isfinite().all() and alone.any()
    assert not orthomerge(torch.stack([zeros, zeros]), base=base).any()
    half = torch.eye(2, dtype=dtype)
    torch.testing.assert_close(orthomerge((-2 * half)[None], base=half), 0.2 * -2 * half)
    low = randn(12, 2, dtype=dtype) @ randn(2, 8, seed=1, dtype=dtype)
    merged = orthomerge(task_vectors, base=low)
    assert merged.isfinite().all() and merged.norm() < 3 * task_vectors.norm()


def test_wrong_options_are_named():
    for option in ("residual", "side"):
        with pytest.raises(ValueError, match=f"{option} is 'none'; valid are"):
            orthomerge(torch.zeros(2, 3, 3), base=torch.zeros(3, 3), **{option: "none"})
