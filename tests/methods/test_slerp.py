"""SLERP and NuSLERP by hand, against a plain formula, and where there is no angle."""

import math

import pytest
import reference_methods as reference
import torch
from cases import distance, randn

from optmerge_core.methods.slerp import nuslerp, slerp

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def test_slerp_by_hand():
    """A quarter turn from (2, 0) to (0, 4), a third of the way: 30 degrees."""
    base, expert = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 4.0])
    merged = base + slerp((expert - base)[None], base=base, t=1 / 3)
    expected = [2 * math.sin(math.radians(60)), 4 * math.sin(math.radians(30))]
    torch.testing.assert_close(merged, torch.tensor(expected))


def test_nuslerp_by_hand():
    """Weights 1 and 2: two thirds of the way; rows alone, and columns alone, each by its angle."""
    task_vectors = torch.tensor([[[2.0, 0.0], [1.0, 0.0]], [[0.0, 4.0], [1.0, 0.0]]])
    near, far = math.sin(math.radians(30)), math.sin(math.radians(60))
    rows = nuslerp(task_vectors, weights=[1, 2], flatten=False)
    torch.testing.assert_close(rows, torch.tensor([[2 * near, 4 * far], [1.0, 0.0]]))
    columns = nuslerp(task_vectors.mT, weights=[1, 2], flatten=False, row_wise=True)
    torch.testing.assert_close(columns, rows.mT)
    whole = nuslerp(task_vectors, weights=[1, 2])
    angle = math.acos(1 / math.sqrt(5 * 17))
    shares = [math.sin(x * angle / 3) / math.sin(angle) for x in (1, 2)]
    torch.testing.assert_close(whole, shares[0] * task_vectors[0] + shares[1] * task_vectors[1])


@DTYPES
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("scale", [1e-3, 1.0])
def test_both_equal_the_plain_formula(dtype, t, scale):
    base = randn(9, 7, dtype=dtype)
    task_vectors = scale * randn(2, 9, 7, seed=1, dtype=dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-10
    whole = (
        reference.slerp(base.double(), base.double() + task_vectors[0].double(), t) - base.double()
    )
    merged = slerp(task_vectors[:1], base=base, t=t)
    assert (merged.double() - whole).norm() < tolerance * task_vectors.norm()
    one, other = task_vectors.double()
    between = reference.slerp(one, other, t)
    assert distance(nuslerp(task_vectors, weights=[1 - t, t]).double(), between) < tolerance
    weights = nuslerp(task_vectors, base=base, weights=[1 - t, t], of="weights")
    flat = nuslerp(torch.stack([base + x for x in task_vectors]), weights=[1 - t, t])
    torch.testing.assert_close(base + weights, flat)


@DTYPES
def test_where_there_is_no_angle_the_way_is_straight(dtype):
    vector, zeros = randn(5, 4, dtype=dtype), torch.zeros(5, 4, dtype=dtype)
    for factor in (1.0, 3.0, -1.0):
        merged = nuslerp(torch.stack([vector, factor * vector]), weights=[3, 1])
        torch.testing.assert_close(merged, (3 + factor) / 4 * vector, atol=1e-5, rtol=1e-4)
    assert not nuslerp(torch.stack([zeros, zeros])).any()
    quarter = nuslerp(torch.stack([vector, zeros]))  # a right angle with nothing, as in mergekit
    torch.testing.assert_close(quarter, math.sqrt(0.5) * vector)
    assert not slerp(zeros[None], base=vector).any()
    assert slerp(vector[None], base=zeros).isfinite().all()
    torch.testing.assert_close(slerp(vector[None], base=vector, t=0.25), 0.25 * vector)


def test_weights_that_cancel_are_equal():
    task_vectors = randn(2, 5, 4)
    assert torch.equal(nuslerp(task_vectors, weights=[1, -1]), nuslerp(task_vectors))


def test_what_is_missing_or_wrong_is_named():
    with pytest.raises(ValueError, match="nuslerp of weights needs base"):
        nuslerp(torch.zeros(2, 3, 3), of="weights")
    with pytest.raises(ValueError, match="of is 'models'; valid are 'task_vectors', 'weights'"):
        nuslerp(torch.zeros(2, 3, 3), of="models")
    with pytest.raises(ValueError, match="weights has 3 values for 2 experts"):
        nuslerp(torch.zeros(2, 3, 3), weights=[1, 2, 3])
