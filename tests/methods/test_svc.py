"""SVC by hand, against the reference, its invariants, and after every method."""

import inspect

import pytest
import reference
import torch
from cases import CASES, distance, experts, fitted, randn

import optmerge_core
from optmerge_core.methods.registry import METHODS, check_options
from optmerge_core.methods.svc import counted, svc


def double(values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("alpha, values", [(1, [1.5, 1]), (0.5, [1.5, 4 / 3]), (2, [4 / 3, 1 / 2])])
def test_svc_by_hand(alpha, values):
    """Experts diag(1, 1) and diag(3, 0), merged diag(4, 1): s is 4 and 4/3, then 1 and 0."""
    task_vectors = torch.diag_embed(double([[1.0, 1.0], [3.0, 0.0]]))
    found = counted(task_vectors.sum(0), task_vectors)
    assert found.S.tolist() == [4, 1]
    assert found.energy.tolist() == [[1, 1], [9, 0]] and found.inner.tolist() == [[4, 1], [12, 0]]
    calibrated = svc(task_vectors.sum(0), task_vectors, alpha)
    torch.testing.assert_close(calibrated, torch.diag(double(values)))


@pytest.mark.parametrize("alpha", [0.2, 1.0])
@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "tsv", "swudi"])
@pytest.mark.parametrize("name", ["tall", "wide", "square", "one expert", "one column"])
def test_svc_equals_the_reference(name, method, alpha):
    task_vectors = CASES[name]
    merged = METHODS[method](task_vectors)
    expected = reference.svc(merged, task_vectors, alpha)
    assert distance(svc(merged, task_vectors, alpha), expected) < 1e-6
    single = svc(merged.float(), task_vectors.float(), alpha)
    assert distance(single, expected.float()) < 1e-3


@pytest.mark.parametrize("null_directions", ["zero", "fill"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_after_iso_c_the_directions_are_those_of_the_sum(null_directions, dtype):
    """Whose even spectrum has none of its own: one alone is asked for, by its singular vectors."""
    task_vectors = experts((40, 24), rank=4, scale=1.0, dtype=dtype)
    merged = METHODS["iso_c"](
        task_vectors, mean_over="nonzero", null_directions=null_directions
    ).double()
    result = svc(merged.to(dtype), task_vectors)
    U, _, Vh = reference.svd(task_vectors.double().sum(0), 12)
    own = U.T @ task_vectors.double()
    s = ((U.T @ merged) * own).sum(2) / own.square().sum(2)
    expected = 3 / s.clamp(min=1).sum(0) * (U.T @ merged @ Vh.T).diagonal()
    assert s.max() > 1.5
    found = U.T @ result.double() @ Vh.T
    torch.testing.assert_close(found, torch.diag(expected), rtol=1e-3, atol=1e-3)


def test_copies_of_an_expert_are_counted_once():
    expert = randn(9, 7, dtype=torch.float64)
    for copies, alpha in ((1, 1.0), (4, 1.0), (4, 0.25)):
        stack = expert.expand(copies, 9, 7)
        torch.testing.assert_close(svc(stack.sum(0), stack, alpha), expert)


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-5), (torch.float64, 1e-9)], ids=str)
def test_what_experts_do_not_share_is_left(dtype, atol):
    """Orthogonal in no coordinate system of the entries, so that rounding is all they share."""
    blocks = torch.zeros(3, 12, 12, dtype=dtype)
    for place, block in enumerate(blocks):
        block[4 * place : 4 * place + 4, 4 * place : 4 * place + 4] = randn(4, 4, seed=place)
    left, right = (torch.linalg.qr(randn(12, 12, seed=seed)).Q.to(dtype) for seed in (7, 8))
    task_vectors = left @ blocks @ right
    total = task_vectors.sum(0)
    torch.testing.assert_close(svc(total, task_vectors), total, rtol=0, atol=atol)
    longer = svc(total, task_vectors, 1 / 3)  # 3 / (1 + 1/3 + 1/3)
    torch.testing.assert_close(longer, 9 / 5 * total, rtol=0, atol=2 * atol)


def test_svc_follows_scale_and_rotation_and_leaves_null_directions():
    task_vectors = experts((20, 12), rank=2)
    merged = METHODS["task_arithmetic"](task_vectors)
    result = svc(merged, task_vectors)
    torch.testing.assert_close(svc(3 * merged, 3 * task_vectors), 3 * result)
    Q = torch.linalg.qr(randn(20, 20, dtype=torch.float64)).Q
    torch.testing.assert_close(svc(Q @ merged, Q @ task_vectors), Q @ result)
    values = torch.linalg.svdvals(result)
    assert (values > 1e-9 * values[0]).sum() == 6
    assert torch.linalg.svdvals(merged).sum() > values.sum() > 0
    zeros = torch.zeros_like(task_vectors)
    assert torch.equal(svc(zeros[0], zeros), zeros[0])


def test_what_is_no_matrix_stays_and_a_mixture_is_calibrated_matrix_by_matrix():
    for shape in ((5,), ()):
        stack = randn(3, *shape)
        assert torch.equal(svc(stack.sum(0), stack), stack.sum(0))
    stack = randn(3, 2, 6, 5)
    alone = [svc(matrices.sum(0), matrices) for matrices in stack.unbind(1)]
    assert torch.equal(svc(stack.sum(0), stack), torch.stack(alone))


def test_wrong_arguments_are_named():
    stack = randn(3, 6, 5)
    for alpha in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="alpha is .*; it must be a positive number"):
            svc(stack[0], stack, alpha)
    with pytest.raises(ValueError, match=r"shape \(6, 5\), the task vectors \(5,\)"):
        inspect.unwrap(svc)(stack[0], stack[0])  # without the types that tests check
    with pytest.raises(ValueError, match="float16"):
        svc(stack[0].half(), stack.half())


def test_svc_is_a_public_name():
    assert optmerge_core.svc is svc


@pytest.mark.parametrize("name", METHODS)
def test_svc_after_every_method(name):
    """By the option that all have: alpha 1 after TSV and Iso-C, 1 / experts after the others."""
    task_vectors = experts((16, 12), scale=0.1)
    stack, more = fitted(name, task_vectors)
    merged = METHODS[name](stack, **more)
    alpha = 1.0 if name in ("tsv", "iso_c", "iso_cts") else 1 / len(stack)
    stack, more = fitted(name, task_vectors)  # its generators begin again
    assert torch.equal(METHODS[name](stack, then="svc", **more), svc(merged, stack, alpha))
    stack, more = fitted(name, task_vectors)
    given = METHODS[name](stack, then={"svc": {"alpha": 0.7}}, **more)
    assert torch.equal(given, svc(merged, stack, 0.7))
    check_options(name, {"then": "svc"})


@pytest.mark.parametrize(
    "then", ["svd", {}, {"svc": {"beta": 1}}, {"svc": 1}, {"svc": {"alpha": 1}, "x": 1}, ["svc"]]
)
def test_what_may_follow_a_method_is_named(then):
    with pytest.raises(ValueError, match=r"then .*: write svc, or \{svc: \{alpha: 0.5\}\}"):
        check_options("ties", {"then": then})
