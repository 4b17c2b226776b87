"""DC-Merge by hand, against the reference, and on task vectors of low rank."""

import pytest
import reference_methods as reference
import torch
from cases import CASES, distance, experts, randn

from optmerge_core.methods.dc_merge import dc_merge


def double(values):
    return torch.tensor(values, dtype=torch.float64)


def test_dc_merge_by_hand():
    """Orthogonal experts of rank 2: the cover space is theirs, M1 diag(4, 2, 0, 0) and so on.

    With half of 16 entries all of the four that are there stay; with one, the largest of each.
    """
    task_vectors = torch.diag_embed(double([[4.0, 2, 0, 0], [0, 0, 3, 1]]))
    for density, spectrum, values in [
        (0.5, "kept", [4, 2, 3, 1]),
        (1 / 16, "kept", [4, 0, 3, 0]),
        (0.5, "mean", [3, 3, 2, 2]),
        (1 / 16, "mean", [3, 3, 2, 2]),  # equal ones all stay
        (0.5, "ramp", [4, 2, 3, 1]),
    ]:
        merged = dc_merge(task_vectors, density=density, spectrum=spectrum)
        torch.testing.assert_close(merged, torch.diag(double(values)))
    ramp = dc_merge(task_vectors, density=0.5, spectrum="ramp", ramp=1.5)
    torch.testing.assert_close(ramp, torch.diag(double([3.6, 2.4, 2.4, 1.6])))


def test_experts_that_agree_are_averaged_and_those_outvoted_left_out():
    """One direction each, the same: Ũ = (e1, e1)/√2, every Mi has s/2 in all four entries."""
    task_vectors = torch.zeros(2, 4, 4, dtype=torch.float64)
    task_vectors[0, 0, 0], task_vectors[1, 0, 0] = 4, 2
    merged = dc_merge(task_vectors, rank=1)
    expected = torch.zeros_like(merged)
    expected[0, 0] = 1.5  # of the average 3 / 2 in both blocks, halved and summed
    torch.testing.assert_close(merged, expected)
    task_vectors[1, 0, 0] = -2
    expected[0, 0] = 2
    torch.testing.assert_close(dc_merge(task_vectors, rank=1), expected)


@pytest.mark.parametrize("spectrum", [None, "kept", "mean", "ramp"])
@pytest.mark.parametrize("density", [1e-3, 0.2])
@pytest.mark.parametrize("name", CASES)
def test_dc_merge_equals_the_reference(name, density, spectrum):
    options = {"density": density, "spectrum": spectrum}
    expected = reference.dc_merge(CASES[name], **options)
    assert distance(dc_merge(CASES[name], **options), expected) < 1e-6


@pytest.mark.parametrize("name", ["tall", "wide", "rank-deficient"])
def test_in_float32_it_is_the_same(name):
    merged = dc_merge(CASES[name].float(), density=0.2)
    assert distance(merged.double(), dc_merge(CASES[name], density=0.2)) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_of_adapters_the_rank_is_theirs(dtype):
    """Neither more directions than there are, nor rounding for one: as with the rank given."""
    task_vectors = experts((96, 64), rank=8, dtype=dtype)
    given = dc_merge(task_vectors, rank=8, spectrum="mean")
    torch.testing.assert_close(dc_merge(task_vectors), given)
    assert torch.linalg.matrix_rank(dc_merge(task_vectors, density=1.0), rtol=1e-4) == 24


def test_the_result_does_not_hang_on_the_coordinates():
    task_vectors = experts((24, 16), rank=4)
    left, right = (torch.linalg.qr(randn(n, n, dtype=torch.float64)).Q for n in (24, 16))
    merged = dc_merge(task_vectors, density=0.1)
    assert (
        distance(dc_merge(left @ task_vectors @ right, density=0.1), left @ merged @ right) < 1e-6
    )


def test_one_expert_and_copies_of_it():
    expert = experts((20, 12), count=1)
    assert distance(dc_merge(expert, density=1.0), expert[0]) < 1e-6
    copies = dc_merge(expert.expand(3, 20, 12), density=1.0)
    U, S, Vh = torch.linalg.svd(expert[0], full_matrices=False)
    assert distance(3 * copies, U[:, :4] * S[:4] @ Vh[:4]) < 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0}, "density is 0"),
        ({"rank": 0}, "rank is 0; it must be at least 1"),
        ({"spectrum": "flat"}, "spectrum is 'flat'; valid are 'kept', 'mean', 'ramp'"),
        ({"ramp": 0.5}, "ramp is 0.5"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        dc_merge(torch.zeros(2, 3, 3), **options)
