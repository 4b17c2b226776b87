"""Iso-C by hand and its options; the reference of full rank is in test_registry.py."""

import pytest
import reference
import torch
from cases import CASES, distance, experts

from optmerge_core.methods.iso_c import iso_c


def test_iso_c_by_hand():
    """Singular values 3 and 1 become 2 and 2."""
    task_vectors = torch.diag_embed(torch.tensor([[1.0, -1.0], [2.0, 0.0]]))
    torch.testing.assert_close(iso_c(task_vectors), torch.diag(torch.tensor([2.0, -2.0])))


@pytest.mark.parametrize(
    ("null_directions", "mean_over", "diagonal"),
    [
        ("zero", "all", [2.0, 2.0, 0.0]),
        ("zero", "nonzero", [3.0, 3.0, 0.0]),
        ("fill", "all", [2.0, 2.0, 2.0]),
        ("fill", "nonzero", [3.0, 3.0, 3.0]),
    ],
)
def test_null_directions_and_means_by_hand(null_directions, mean_over, diagonal):
    """Singular values 4, 2 and 0; in three dimensions two directions leave one, of any sign."""
    task_vectors = torch.diag_embed(torch.tensor([[4.0, -1.0, 0.0], [0.0, 3.0, 0.0]]))
    merged = iso_c(task_vectors, null_directions=null_directions, mean_over=mean_over)
    merged[2, 2] = merged[2, 2].abs()
    torch.testing.assert_close(merged, torch.diag(torch.tensor(diagonal)))


@pytest.mark.parametrize("name", CASES)
def test_filled_iso_c_equals_the_reference_of_the_same_completion(name):
    merged = iso_c(CASES[name], null_directions="fill")
    assert distance(merged, reference.iso_c(CASES[name], fill=True)) < 1e-6


@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (64, 64)])
def test_filled_iso_c_is_the_released_codes_but_for_arbitrary_directions(shape):
    """Beside an SVD in float32: the spectrum, and all that lies in the experts' span."""
    task_vectors = experts(shape, rank=8, dtype=torch.float32)
    filled = iso_c(task_vectors, null_directions="fill")
    released, ours = reference.iso_c(task_vectors), iso_c(task_vectors)
    for merged in (filled, released):
        values = torch.linalg.svdvals(merged)
        torch.testing.assert_close(values, values.mean().expand(64), rtol=1e-4, atol=0)
    torch.testing.assert_close(filled.norm(), released.norm(), rtol=1e-5, atol=0)
    U, _, Vh = reference.svd(task_vectors.sum(0), 24)
    for merged in (filled, released):
        inside = U @ (U.T @ merged @ Vh.T) @ Vh
        assert distance(inside, ours) < 1e-4
        assert distance(inside + (merged - U @ (U.T @ merged)), merged) < 1e-4
    assert distance(filled, released) > 0.5  # the rest is not: 40 of 64 directions
    torch.testing.assert_close(ours.norm() / filled.norm(), torch.tensor(24 / 64).sqrt())


def test_wrong_options_are_named():
    for option in ("null_directions", "mean_over"):
        with pytest.raises(ValueError, match=f"{option} is 'none'; valid are"):
            iso_c(torch.zeros(2, 3, 3), **{option: "none"})
