"""The closed forms of WUDI against their formulas and by hand."""

import math

import pytest
import reference
import torch
from cases import CASES, DTYPES, distance, experts

from optmerge_core.methods.registry import METHODS
from optmerge_core.methods.swudi import aswudi, swudi


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["swudi", "aswudi"])
def test_spectral_variants_equal_their_formula(name, case, dtype):
    expected = getattr(reference, name)(CASES[case])
    result = METHODS[name](CASES[case].to(dtype))
    assert result.dtype == dtype
    assert distance(result.double(), expected) < {torch.float32: 1e-4, torch.float64: 1e-7}[dtype]


def test_closed_forms_by_hand():
    """1 and 3 as 1×1 matrices: C = 2, the sum 4, the minimum 2, as in test_wudi.py."""
    task_vectors = torch.tensor([1.0, 3.0], dtype=torch.float64).view(2, 1, 1)
    assert aswudi(task_vectors).item() == pytest.approx(2)
    expected = 4 + (2 - 4) * (1 - math.exp(-0.5 * 2))
    assert swudi(task_vectors, exp_time=0.5, rank_ratio=1.0).item() == pytest.approx(expected)


def test_presets_are_the_later_releases_settings():
    task_vectors = experts((12, 150), count=2)
    for preset, settings in (("full", (300.0, 0.65)), ("lora", (1300.0, 0.01))):
        expected = reference.swudi(task_vectors, *settings)
        assert distance(swudi(task_vectors, preset=preset), expected) < 1e-7
    assert torch.equal(swudi(task_vectors), swudi(task_vectors, preset="full"))
    mixed = swudi(task_vectors, preset="lora", exp_time=2.0)
    assert distance(mixed, reference.swudi(task_vectors, 2.0, 0.01)) < 1e-7
