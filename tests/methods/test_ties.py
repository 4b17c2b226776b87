"""TIES by hand and against the reference; thresholds against sorting."""

import pytest
import reference
import torch
from cases import randn
from hypothesis import given, settings
from hypothesis import strategies as st

from optmerge_core.methods.blocks import Blocks
from optmerge_core.methods.registry import METHODS
from optmerge_core.methods.ties import ties, ties_blocks, trim


def test_ties_by_hand():
    """k = int(0.6·5) = 3: kept are magnitudes ≥ 3 of the first, ≥ 3 of the second expert."""
    task_vectors = torch.tensor([[1.0, -2.0, 3.0, 4.0, -5.0], [5.0, 1.0, 2.0, -3.0, -4.0]])
    assert trim(Blocks.of(task_vectors), 0.4)[0].tolist() == [3, 3]
    # Sums 5, 0, 3, 1, −9; the fourth elects +, so that −3 is left out; −5 and −4 average.
    assert ties(task_vectors, density=0.4).tolist() == [5, 0, 3, 4, -4.5]


def test_ties_lets_the_majority_decide_where_the_sum_is_zero():
    task_vectors = torch.tensor([[2.0, 1.0, 1.0], [-2.0, 1.0, 1.0]])
    assert ties(task_vectors, density=1.0).tolist() == [2, 1, 1]
    assert ties(-task_vectors, density=1.0).tolist() == [-2, -1, -1]
    draw = torch.tensor([[2.0, 1.0, -1.0], [-2.0, 1.0, -1.0]])
    assert ties(draw, density=1.0).tolist() == [0, 1, -1]


@given(
    integers=st.lists(st.lists(st.integers(-4, 4), min_size=6, max_size=6), min_size=1, max_size=4),
    density=st.sampled_from([0.05, 0.2, 0.5, 0.8, 1.0]),
)
@settings(max_examples=150, deadline=None)
def test_ties_equals_the_reference_ties_and_zeros_included(integers, density):
    task_vectors = torch.tensor(integers, dtype=torch.float64).view(-1, 2, 3)
    result = ties(task_vectors, density=density)
    torch.testing.assert_close(result, reference.ties(task_vectors, density))


def test_ties_keeps_the_share_density():
    task_vectors = randn(1, 50, 40)
    for density in (0.01, 0.2, 0.5, 1.0):
        kept = (ties(task_vectors, density=density) != 0).sum().item()
        assert kept == min(2000 - int((1 - density) * 2000) + 1, 2000)


def test_ties_takes_thresholds_of_a_whole_model():
    task_vectors = randn(2, 6, 5)
    model = torch.cat([task_vectors.flatten(1), 9 * randn(2, 70)], dim=1)
    whole = trim(Blocks.of(model), 0.2)[0]
    trimmed = torch.where(task_vectors.abs() >= whole.view(2, 1, 1), task_vectors, 0)
    expected = reference.ties(trimmed, density=1.0)
    torch.testing.assert_close(ties(task_vectors, thresholds=whole), expected)
    with pytest.raises(ValueError, match="each of the 2 experts"):
        ties(task_vectors, thresholds=torch.zeros(3))


def test_ties_trims_tensors_too_large_for_torch_quantile():
    task_vectors = torch.arange(1, 2**24 + 11, dtype=torch.float64).view(1, -1)
    k = int(0.8 * task_vectors.shape[1])
    assert trim(Blocks.of(task_vectors), 0.2)[0].item() == k


@pytest.mark.parametrize("size", [1, 6, 40])
def test_ties_in_blocks_equals_ties_entry_by_entry(monkeypatch, size):
    """Small whole numbers: many experts cancel exactly, so blocks are gone through twice."""
    monkeypatch.setattr(Blocks.of.__func__, "__defaults__", (6,))
    stack = torch.randint(-2, 3, (4, size), generator=torch.Generator().manual_seed(size)).float()
    for density in (0.2, 0.6, 1.0):
        expected = reference.ties(stack, density)
        assert torch.equal(METHODS["ties"](stack, density=density), expected)
        assert torch.equal(METHODS["ties"](-stack, density=density), -expected)


# mergekit's rule: so many entries, not all that reach a threshold


def test_of_equal_magnitudes_the_first_in_memory_are_kept():
    """int(0.5·6) = 3 of the first: the 5 and of the four 3s two; of the second its three 1s."""
    task_vectors = torch.tensor([[3.0, -3, 5, 0, 3, -3], [0, 0, 1, 0, -1, -1]])
    merged = ties(task_vectors, density=0.5, rule="mergekit")
    assert merged.tolist() == [3, -3, 3, 0, -1, -1]  # the third: (5 + 1) / 2
    one = ties(task_vectors[:1].flip(1), density=0.5, rule="mergekit")
    assert one.tolist() == [-3, 3, 0, 5, 0, 0]


@given(
    integers=st.lists(st.lists(st.integers(-3, 3), min_size=9, max_size=9), min_size=1, max_size=4),
    size=st.integers(1, 9),
    weighted=st.booleans(),
    normalize=st.booleans(),
    block=st.sampled_from([1, 2, 5, 100]),
    data=st.data(),
)
@settings(max_examples=300, deadline=None)
def test_mergekits_rule_equals_the_reference(integers, size, weighted, normalize, block, data):
    """Draws at the threshold, zeros, and experts that cancel, in one block or across several."""
    stack = torch.tensor(integers, dtype=torch.float64)[:, :size]
    shares = st.sampled_from([0.01, 0.2, 0.34, 0.5, 0.8, 1.0])
    densities = [data.draw(shares) for _ in stack]
    weights = [data.draw(st.sampled_from([0.25, 1.0, -0.5])) for _ in stack] if weighted else None
    expected = reference.ties_by_count(stack, densities, weights, normalize)
    options = {"density": densities, "weights": weights, "normalize": normalize, "rule": "mergekit"}
    torch.testing.assert_close(ties(stack, **options), expected, rtol=1e-12, atol=1e-12)
    merged = torch.full_like(expected, torch.nan)
    for entries, _, result in ties_blocks(Blocks.of(stack, block), **options):
        merged[entries] = result
    torch.testing.assert_close(merged, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sample", [8, 1 << 16])
@pytest.mark.parametrize("half", [False, True])
def test_mergekits_rule_keeps_its_count_of_every_expert(monkeypatch, sample, half):
    """Whether equal entries are many, one, or end a block; zeros count, but do not show."""
    monkeypatch.setattr("optmerge_core.methods.blocks.SAMPLE", sample)
    stack = randn(1, 50, 40).bfloat16().float() if half else randn(1, 50, 40)
    stack[0, :10] = 0
    for density in (0.0001, 0.01, 0.2, 0.5, 0.79, 0.8, 0.81, 1.0):
        count = max(1, int(density * 2000))
        order = stack.flatten().abs().argsort(descending=True, stable=True)
        expected = torch.zeros(2000)
        expected[order[:count]] = stack.flatten()[order[:count]]
        merged = ties(stack, density=density, rule="mergekit")
        assert (merged != 0).sum() == min(count, 1600)
        assert torch.equal(merged.flatten(), expected)
