"""Task singular vectors by hand and in special cases; the reference is in test_registry.py."""

import pytest
import reference
import torch
from cases import CASES, distance, experts, randn

from optmerge_core.methods.tsv import tsv


def test_tsv_by_hand():
    """Rank 1 each. The outputs e1 and (e1 + e2)/√2 turn by 22.5° to be orthogonal."""
    task_vectors = torch.zeros(2, 2, 2, dtype=torch.float64)
    task_vectors[0, 0, 0] = 2.0
    task_vectors[1, :, 1] = 3 / 2**0.5
    cos, sin = torch.tensor(torch.pi / 8).double().cos(), torch.tensor(torch.pi / 8).double().sin()
    expected = torch.stack([torch.stack([2 * cos, 3 * sin]), torch.stack([-2 * sin, 3 * cos])])
    torch.testing.assert_close(tsv(task_vectors), expected)


def test_tsv_of_orthogonal_experts_is_their_sum():
    task_vectors = torch.zeros(2, 8, 6)
    task_vectors[0, :4, :3], task_vectors[1, 4:, 3:] = randn(4, 3), randn(4, 3, seed=1)
    torch.testing.assert_close(tsv(task_vectors), task_vectors.sum(0))


def test_tsv_counts_a_shared_direction_once():
    """Equal experts: the one that is left has no arbitrary partner."""
    expert = randn(8, 6)
    U, S, Vh = reference.svd(expert, 3)
    once = U @ torch.diag(S) @ Vh
    for factor in (1, 3, -1):
        merged = tsv(torch.stack([expert, factor * expert]))
        torch.testing.assert_close(merged, (1 + factor) / 2 * once, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_filled_tsv_equals_the_reference_of_the_same_completion(name):
    merged = tsv(CASES[name], null_directions="fill")
    assert distance(merged, reference.tsv(CASES[name], fill=True)) < 1e-6


@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (60, 60)])
def test_filled_tsv_has_the_released_codes_spectrum(shape):
    """All of experts·k vectors are orthonormal, so that it is that of all experts together."""
    task_vectors = experts(shape, rank=8, dtype=torch.float32)
    values = torch.linalg.svdvals(task_vectors)[:, :8].flatten().sort(descending=True).values
    filled, released = tsv(task_vectors, null_directions="fill"), reference.tsv(task_vectors)
    for merged in (filled, released):
        found = torch.linalg.svdvals(merged)
        torch.testing.assert_close(found[:24], values, rtol=1e-4, atol=0)
        assert found[24:].max() < 1e-5 * found[0]
    assert distance(filled, tsv(task_vectors)) > 0.2  # the real directions turn away from others
    U, _, Vh = reference.svd(task_vectors.sum(0), 24)
    for merged in (filled, released):
        assert (merged - U @ (U.T @ merged)).norm() > 0.2 * merged.norm()


def test_filled_tsv_gives_a_shared_direction_a_partner_as_the_released_code():
    expert = experts((24, 20), count=1, rank=10, dtype=torch.float32)[0]
    task_vectors = torch.stack([expert, expert])
    twice = torch.linalg.svdvals(expert)[:10].repeat_interleave(2)
    for merged in (tsv(task_vectors, null_directions="fill"), reference.tsv(task_vectors)):
        torch.testing.assert_close(torch.linalg.svdvals(merged), twice, rtol=1e-3, atol=1e-8)


def test_what_fills_null_directions_hangs_on_the_place_of_an_expert():
    task_vectors = experts((24, 20), rank=2)
    merged, turned = (
        tsv(stack, null_directions="fill") for stack in (task_vectors, task_vectors.flip(0))
    )
    assert distance(turned, merged) > 0.05
    torch.testing.assert_close(torch.linalg.svdvals(turned), torch.linalg.svdvals(merged))


def test_a_wrong_option_is_named():
    with pytest.raises(ValueError, match="null_directions is 'none'; valid are 'zero', 'fill'"):
        tsv(torch.zeros(2, 3, 3), null_directions="none")
