"""Iso-CTS by hand, against the reference, and on task vectors of low rank."""

import pytest
import reference_methods as reference
import torch
from cases import CASES, distance, experts

from optmerge_core.methods.iso_c import iso_c
from optmerge_core.methods.iso_cts import counts, iso_cts


def test_iso_cts_by_hand():
    """q = 5, K = 2: 3 common, one each. Σ τi = diag(9, 8, 7, 1, 1): the own ones are e4 and e5."""
    task_vectors = torch.diag_embed(torch.tensor([[9.0, 0, 0, 1, 0], [0, 8, 7, 0, 1]]))
    assert counts(5, 2, 0.6) == (3, 1)
    merged = iso_cts(task_vectors, common_ratio=0.6)
    torch.testing.assert_close(merged, torch.eye(5) * 26 / 5)


def test_what_is_common_is_no_experts_own():
    """Σ has e1 alone; of the second expert, 3 e1 + e2 in equal columns, only e2 is left."""
    task_vectors = torch.zeros(2, 4, 4, dtype=torch.float64)
    task_vectors[0, 0, 0], task_vectors[0, 2, 2], task_vectors[0, 3, 3] = 9, 1e-3, 1e-4
    task_vectors[1, 0, 1], task_vectors[1, 1, 1] = 3, 1
    merged = iso_cts(task_vectors, common_ratio=0.5)  # two common, one each
    expected = reference.iso_cts(task_vectors, 0.5)
    assert distance(merged, expected) < 1e-6


@pytest.mark.parametrize(
    ("q", "experts", "ratio", "expected"),
    [(64, 3, 0.8, (52, 4)), (64, 8, 0.8, (48, 2)), (8, 5, 0.8, (8, 0)), (5, 3, 0.1, (2, 1))],
)
def test_how_many_are_common(q, experts, ratio, expected):
    assert counts(q, experts, ratio) == expected


DEPENDENT = ("rank-deficient", "rank-deficient wide")
"""What is left to three experts of rank 3, beside 6 common directions, are the same three."""


@pytest.mark.parametrize("ratio", [0.8, 0.3])
@pytest.mark.parametrize("name", CASES)
def test_iso_cts_equals_the_reference(name, ratio):
    expected = reference.iso_cts(CASES[name], ratio)
    assert distance(iso_cts(CASES[name], common_ratio=ratio), expected) < 1e-6
    if ratio == 0.8 or name not in DEPENDENT:  # else rounding makes them independent
        single = iso_cts(CASES[name].float(), common_ratio=ratio)
        assert distance(single.double(), expected) < 1e-3


@pytest.mark.parametrize("name", CASES)
def test_filled_iso_cts_equals_the_reference_of_the_same_completion(name):
    merged = iso_cts(CASES[name], null_directions="fill")
    assert distance(merged, reference.iso_cts(CASES[name], fill=True)) < 1e-6


@pytest.mark.parametrize("name", ["rank-deficient", "rank-deficient wide", "one expert"])
def test_of_low_ranks_q_may_be_their_sum(name):
    merged = iso_cts(CASES[name], size="nonzero")
    assert distance(merged, reference.iso_cts(CASES[name], size="nonzero")) < 1e-6
    values = torch.linalg.svdvals(merged)
    kept = values > 1e-6 * values[0]
    torch.testing.assert_close(values[kept], values[0].expand(int(kept.sum())))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_of_adapters_all_is_common_and_nothing_is_made_of_rounding(dtype):
    task_vectors = experts((96, 64), rank=8, dtype=dtype)
    assert distance(iso_cts(task_vectors), iso_c(task_vectors)) < 1e-5


def test_copies_of_one_expert_and_one_expert_are_its_own_even_spectrum():
    expert = experts((20, 12), count=1)
    once = iso_cts(expert)
    assert distance(once, iso_c(expert)) < 1e-6
    copies = iso_cts(expert.expand(3, 20, 12))
    values = torch.linalg.svdvals(copies)
    assert copies.isfinite().all() and values[0] > 0


def test_wrong_options_are_named():
    for option, value in (("size", "some"), ("null_directions", "none"), ("common_ratio", 0)):
        with pytest.raises(ValueError, match=f"{option} is {value!r}"):
            iso_cts(torch.zeros(2, 3, 3), **{option: value})
