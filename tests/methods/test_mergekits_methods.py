"""Breadcrumbs, DELLA, SCE and Model Stock by hand, against references, and in special cases."""

import inspect
import math

import pytest
import reference
import reference_methods
import torch
from cases import CASES, distance, generators, randn

from optmerge_core.methods.blocks import largest
from optmerge_core.methods.breadcrumbs import breadcrumbs, breadcrumbs_ties, crumbs
from optmerge_core.methods.della import _ranks, della, della_linear, magprune
from optmerge_core.methods.model_stock import model_stock
from optmerge_core.methods.sce import sce

STACK = torch.tensor([[5.0, -4.0, 3.0, -2.0, 1.0], [-1.0, -6.0, 2.0, 4.0, 0.5]])


def test_crumbs_by_hand():
    """Of five entries two: after one outlier, or none."""
    assert crumbs(STACK, 0.4, 0.2).tolist() == [[0, -4, 3, 0, 0], [0, 0, 2, 4, 0]]
    assert crumbs(STACK, 0.4, 0.0).tolist() == [[5, -4, 0, 0, 0], [0, -6, 0, 4, 0]]
    assert crumbs(STACK, 0.8, 0.6).tolist() == [[0, -4, 3, -2, 1], [-1, 0, 2, 4, 0.5]]
    assert torch.equal(crumbs(STACK, 1.0, 0.4), STACK) and not crumbs(STACK, 0.1, 0.2).any()
    assert crumbs(STACK, [0.4, 1.0], [0.2, 0.2]).tolist() == [[0, -4, 3, 0, 0], STACK[1].tolist()]
    options = {"density": 0.4, "gamma": 0.2}
    assert breadcrumbs(STACK, **options).tolist() == [0, -4, 5, 4, 0]
    assert breadcrumbs(STACK, **options, weights=[1, 3], normalize=True).tolist() == [
        0, -1, 2.25, 3, 0,
    ]  # fmt: skip
    opposed = torch.tensor([[5.0, 3.0, 1.0], [-4.0, -2.0, 3.0]])
    options = {"density": 0.7, "gamma": 0.4}
    assert breadcrumbs_ties(opposed, **options).tolist() == [0, 3, 4]
    assert breadcrumbs_ties(opposed, **options, normalize=True).tolist() == [0, 3, 2]


@pytest.mark.parametrize(("density", "gamma"), [(0.9, 0.01), (0.5, 0.1), (0.95, 0.3), (0.3, 0.0)])
@pytest.mark.parametrize("halves", [False, True])
def test_crumbs_equal_the_reference(density, gamma, halves):
    stack = randn(3, 13, 11)
    stack = (4 * stack).round() / 4 if halves else stack  # with many equal magnitudes
    kept = crumbs(stack, density, gamma)
    assert torch.equal(kept, reference_methods.crumbs(stack, density, gamma))
    assert torch.equal(breadcrumbs(stack, density=density, gamma=gamma), kept.sum(0))
    expected = reference.ties_by_count(kept, [1.0] * 3, normalize=False)
    merged = breadcrumbs_ties(stack, density=density, gamma=gamma)
    torch.testing.assert_close(merged, expected)


@pytest.mark.parametrize("count", [-1, 0, 1, 7, 199, 200, 300])
def test_the_largest_entries_are_as_many_as_asked_for(count):
    row = (4 * randn(200)).round()
    found = largest(row, count)
    order = sorted(range(200), key=lambda j: (-abs(row[j].item()), j))
    assert sorted(found.nonzero()[:, 0].tolist()) == sorted(order[: max(count, 0)])


def test_magprune_by_hand():
    """Ranks within a row from density − epsilon to density + epsilon, the largest most likely."""
    ranks = _ranks(torch.tensor([[3.0, -1.0, 2.0], [0.0, -5.0, 0.0]]))
    assert ranks.tolist() == [[1, 0, 0.5], [0, 1, 0.5]]
    assert _ranks(torch.tensor([4.0, -2.0])).tolist() == [1, 0]
    assert _ranks(torch.tensor([[4.0], [2.0]])).tolist() == [[0.5], [0.5]]
    stack = torch.tensor([[3.0, -1.0, 2.0, 4.0]])
    drawn = torch.rand(4, generator=generators(7)[0])
    p = 0.5 + 0.2 * (2 * torch.tensor([2 / 3, 0, 1 / 3, 1]) - 1)
    kept = magprune(stack, 0.5, 0.2, True, generators(7))
    torch.testing.assert_close(kept[0], torch.where(drawn < p, stack[0] / p, 0))
    plain = magprune(stack, 0.5, 0.2, False, generators(7))
    assert plain[0].tolist() == torch.where(drawn < p, stack[0], 0).tolist()


def test_magprune_keeps_the_expectation_and_the_share():
    stack = torch.linspace(0.5, 2, 40_000).view(1, 200, 200)
    kept = magprune(stack, 0.6, 0.3, True, generators(0))
    share = (kept != 0).float().mean().item()
    assert share == pytest.approx(0.6, abs=0.01)
    rows = (kept[0] != 0).float()
    assert rows[:, :20].mean() < 0.4 < 0.8 < rows[:, -20:].mean()
    assert kept.mean().item() == pytest.approx(stack.mean().item(), rel=0.02)


def test_della_is_ties_or_a_sum_of_what_is_kept():
    stack = randn(3, 8, 6)
    options = {"density": [0.5, 0.7, 1.0], "epsilon": [0.4, 0.1, 0.0], "weights": [1.0, -0.5, 2.0]}
    kept = magprune(stack, options["density"], options["epsilon"], True, generators(0, 1, 2))
    assert torch.equal(kept[2], stack[2])
    linear = della_linear(stack, generator=generators(0, 1, 2), **options)
    weights = torch.tensor(options["weights"]).view(3, 1, 1)
    torch.testing.assert_close(linear, (weights * kept).sum(0))
    mean = della_linear(stack, generator=generators(0, 1, 2), normalize=True, **options)
    torch.testing.assert_close(mean, linear / 2.5)
    merged = della(stack, generator=generators(0, 1, 2), **options)
    expected = reference.ties_by_count(kept, [1.0] * 3, options["weights"])
    torch.testing.assert_close(merged, expected)
    again = della(stack, generator=generators(0, 1, 2), **options)
    other = della(stack, generator=generators(0, 1, 3), density=0.5)
    assert torch.equal(again, merged) and not torch.equal(other, merged)


@pytest.mark.parametrize("options", [{"density": 0.9, "epsilon": 0.1}, {"density": 0.1}])
def test_probabilities_lie_between_0_and_1(options):
    with pytest.raises(ValueError, match="epsilon is .*; density .* it must lie between 0 and 1"):
        della(torch.zeros(2, 3, 3), **options)
    with pytest.raises(ValueError, match="rescale is 'no'; valid are True, False"):
        inspect.unwrap(magprune)(torch.zeros(2, 3, 3), 0.5, 0.1, "no")


def test_sce_by_hand():
    """Variances 9, 1, 1/4, 9, 1/16. The weights of all are 55 and 57.25 of 112.25."""
    merged = sce(STACK)
    share = torch.tensor([55, 57.25]) / 112.25
    expected = [5, -(share @ torch.tensor([4.0, 6.0])), share @ torch.tensor([3.0, 2.0]), 4,
                share @ torch.tensor([1.0, 0.5])]  # fmt: skip
    torch.testing.assert_close(merged, torch.tensor([float(x) for x in expected]))
    # The two of largest variance: 25 + 4 and 1 + 16, and the signs of 4 and 2.
    assert sce(STACK, select_topk=0.4).tolist() == [5, 0, 0, 4, 0]
    assert not sce(STACK, select_topk=0.0).any() and not sce(STACK[:1], select_topk=0.5).any()


@pytest.mark.parametrize("select_topk", [1.0, 0.5, 0.1])
@pytest.mark.parametrize("name", CASES)
def test_sce_equals_the_reference(name, select_topk):
    expected = reference_methods.sce(CASES[name], select_topk)
    assert distance(sce(CASES[name], select_topk=select_topk), expected) < 1e-6


def test_small_task_vectors_weigh_the_same_in_mergekit():
    small = torch.stack([2e-4 * randn(6, 5), 1e-4 * randn(6, 5, seed=1)])
    merged, uniform = sce(small), sce(small, rule="mergekit")
    assert distance(1e3 * merged, sce(1e3 * small)) < 1e-5
    assert distance(1e3 * uniform, sce(1e3 * small, rule="mergekit")) > 0.01
    agree = (small[0] * small[1]) > 0
    torch.testing.assert_close(uniform[agree], small.mean(0)[agree])


def test_model_stock_by_hand():
    """Two of one length at 60°: t = 2 cos 60° / (1 + cos 60°) = 2/3."""
    stack = torch.tensor([[1.0, 0.0], [0.5, math.sqrt(0.75)]])
    torch.testing.assert_close(model_stock(stack), 2 / 3 * stack.mean(0))
    rows = torch.stack([torch.stack([x, y]) for x, y in zip(stack, stack.flip(0), strict=True)])
    rows[1, 1] = rows[0, 1]
    merged = model_stock(rows, filter_wise=True)
    torch.testing.assert_close(merged, torch.stack([2 / 3 * stack.mean(0), rows[0, 1]]))
    assert not torch.allclose(model_stock(rows), merged)


@pytest.mark.parametrize("name", ["tall", "wide", "square", "rank-deficient", "one column"])
def test_model_stock_equals_the_reference(name):
    expected = reference_methods.model_stock(CASES[name])
    assert distance(model_stock(CASES[name]), expected) < 1e-10
    assert distance(model_stock(CASES[name].float()).double(), expected) < 1e-5
    assert distance(1e-4 * model_stock(CASES[name]), model_stock(1e-4 * CASES[name])) < 1e-10
    rows = [reference_methods.model_stock(row) for row in CASES[name].unbind(1)]
    assert distance(model_stock(CASES[name], filter_wise=True), torch.stack(rows)) < 1e-10


def test_model_stock_of_copies_of_one_of_opposites_and_of_zeros():
    expert = randn(6, 5)
    for copies in (1, 2, 4):
        torch.testing.assert_close(model_stock(expert.expand(copies, 6, 5)), expert)
    assert not model_stock(torch.stack([expert, -expert])).any()
    zero = torch.stack([expert, torch.zeros(6, 5)])
    assert not model_stock(zero).any() and not model_stock(zero, filter_wise=True).any()
    small = 1e-4 * torch.stack([expert, expert])
    assert model_stock(small, rule="mergekit").norm() < 0.9 * model_stock(small).norm()
    assert model_stock(randn(2, 4), filter_wise=True).shape == (4,)
