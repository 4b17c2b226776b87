"""DARE: how much is dropped, what it hangs on, what follows."""

import pytest
import reference
import torch
from cases import generators, randn

from optmerge_core.methods.dare import dare, dare_task_arithmetic, dare_ties
from optmerge_core.methods.ties import ties


def test_dare_drops_at_its_rate_and_keeps_the_mean():
    dropped = dare(torch.ones(2, 300, 300), 0.3, torch.Generator().manual_seed(0))
    assert set(dropped.unique().tolist()) == {0.0, torch.tensor(1 / 0.7).item()}
    assert (dropped == 0).float().mean().item() == pytest.approx(0.3, abs=0.005)
    assert dropped.mean().item() == pytest.approx(1, abs=0.01)
    assert not torch.equal(dropped[0], dropped[1])


def test_a_fifth_is_dropped_unless_told_otherwise():
    ones = torch.ones(1, 300, 300)
    for method in (dare_task_arithmetic, dare_ties):
        merged = method(ones, generator=generators(0))
        assert set(merged.unique().tolist()) == {0.0, 1.25}
        assert (merged == 0).float().mean().item() == pytest.approx(0.2, abs=0.005)


def test_dare_depends_on_the_experts_generator_not_its_position():
    task_vectors = randn(3, 6, 5)
    forward = dare(task_vectors, 0.5, generators(1, 2, 3))
    backward = dare(task_vectors.flip(0), 0.5, generators(3, 2, 1))
    assert torch.equal(forward.flip(0), backward)
    with pytest.raises(ValueError, match="2 generators for 3 experts"):
        dare(task_vectors, 0.5, generators(1, 2))


def test_dare_draws_where_the_generator_lives_whatever_torchs_default_is():
    ones = torch.ones(2, 6, 5)
    expected = dare(ones, 0.5, generators(1, 2))
    with torch.device("meta"):
        assert torch.equal(dare(ones, 0.5, generators(1, 2)), expected)


def test_dare_without_a_generator_draws_from_torchs_own():
    task_vectors = randn(2, 6, 5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first = dare_task_arithmetic(task_vectors)
        second = dare_task_arithmetic(task_vectors)
        torch.manual_seed(0)
        assert torch.equal(dare_task_arithmetic(task_vectors), first)
    assert not torch.equal(first, second)


def test_dare_then_the_method():
    task_vectors = randn(3, 6, 5)
    dropped = dare(task_vectors, 0.4, generators(1, 2, 3))
    options = {"drop_rate": 0.4, "generator": generators(1, 2, 3)}
    torch.testing.assert_close(dare_task_arithmetic(task_vectors, **options), dropped.sum(0))
    options["generator"] = generators(1, 2, 3)
    expected = reference.ties(dropped, density=0.5)
    torch.testing.assert_close(dare_ties(task_vectors, density=0.5, **options), expected)


def test_dare_without_dropping_is_the_method():
    task_vectors = randn(3, 6, 5)
    assert torch.equal(dare_task_arithmetic(task_vectors, drop_rate=0), task_vectors.sum(0))
    assert torch.equal(dare_ties(task_vectors, drop_rate=0), ties(task_vectors))
