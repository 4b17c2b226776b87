"""WUDI and OptMerge against autograd and torch.optim loops, on every kind of task vectors."""

import math

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optmerge_core.methods.interference import interference
from optmerge_core.methods.optmerge import (
    PRESETS,
    minimise_interference,
    optmerge,
    targets_and_subspaces,
    wudi,
)
from optmerge_core.methods.registry import METHODS
from optmerge_core.methods.swudi import aswudi, swudi

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
DTYPES = list(TOLERANCE)


def experts(shape, count=3, seed=0, rank=None, scale=1e-3, dtype=torch.float64):
    """Task vectors with decaying spectra, entries of RMS about `scale`, of `rank` if given."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape
    inner = rank or min(shape)
    left = torch.randn(count, rows, inner, generator=generator, dtype=torch.float64)
    right = torch.randn(count, inner, columns, generator=generator, dtype=torch.float64)
    decay = torch.linspace(1, 0.1, inner, dtype=torch.float64).view(-1, 1)
    product = left @ (decay * right)
    return (product * scale / product.square().mean().sqrt()).to(dtype)


def with_zero_expert(shape):
    task_vectors = experts(shape)
    task_vectors[1] = 0
    return task_vectors


CASES = {
    "tall": experts((48, 20)),
    "wide": experts((20, 48)),
    "square": experts((32, 32), count=5),
    "rank-deficient": experts((40, 24), rank=3),
    "rank-deficient wide": experts((24, 40), rank=3),
    "one expert": experts((24, 20), count=1),
    "one zero expert": with_zero_expert((24, 20)),
    "more experts than columns": experts((12, 3), count=5),
    "one column": experts((12, 1), count=3),
    "all zero": torch.zeros(3, 6, 4, dtype=torch.float64),
}
REFERENCES = {
    "wudi": (wudi, reference.wudi),
    "full": (optmerge, reference.optmerge_full),
    "lora": (lambda t, **k: optmerge(t, preset="lora", **k), reference.optmerge_lora),
    "modality": (lambda t, **k: optmerge(t, preset="modality", **k), reference.optmerge_modality),
}


def ridge(task_vectors):
    return wudi(task_vectors, optimizer="ridge")


def named(name):
    if name == "ridge":
        return ridge
    return REFERENCES[name][0] if name in REFERENCES else METHODS[name]


def distance(result, expected):
    assert result.dtype == expected.dtype and result.shape == expected.shape
    assert result.isfinite().all()
    if expected.norm() == 0:
        return result.norm().item()
    return ((result - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", REFERENCES)
def test_equals_the_loop(name, case, dtype):
    method, loop = REFERENCES[name]
    task_vectors = CASES[case].to(dtype)
    before = task_vectors.clone()
    result = method(task_vectors)
    assert distance(result, loop(task_vectors)[0]) < TOLERANCE[dtype]
    assert torch.equal(task_vectors, before)
    assert torch.equal(method(task_vectors), result)


@pytest.mark.parametrize(
    ("name", "learning_rate"),
    [("wudi", 1e-4), ("full", 1e-4), ("lora", 0.3), ("modality", 0.6)],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_loop_when_it_moves_far(name, learning_rate, dtype):
    """From its start the optimum is nearly reached: the loss falls by a half or more."""
    method, loop = REFERENCES[name]
    task_vectors = experts((32, 24), rank=4, dtype=dtype)
    expected, trace = loop(task_vectors, learning_rate=learning_rate)
    assert trace[-1][1] < 0.5 * trace[0][1]
    result = method(task_vectors, learning_rate=learning_rate)
    assert distance(result, expected) < TOLERANCE[dtype]


def test_divergence_is_that_of_the_loop():
    task_vectors = experts((16, 12))
    expected, trace = reference.optmerge_modality(task_vectors, learning_rate=4.0, steps=60)
    assert trace[-1][2] > 1e6 * trace[0][2]
    assert distance(optmerge(task_vectors, preset="modality", learning_rate=4.0, steps=60),
                    expected) < 1e-9  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["tall", "wide", "rank-deficient", "one zero expert", "all zero"])
@pytest.mark.parametrize("name", REFERENCES)
def test_on_step_gives_the_loops_loss_and_norm(name, case, dtype):
    method, loop = REFERENCES[name]
    task_vectors = CASES[case].to(dtype)
    trace = []
    result = method(task_vectors, steps=40, on_step=lambda *step: trace.append(step))
    expected, expected_trace = loop(task_vectors, steps=40)
    assert [step for step, _, _ in trace] == list(range(41))
    tolerance = 10 * TOLERANCE[dtype]
    for (_, loss, norm), (_, expected_loss, expected_norm) in zip(
        trace, expected_trace, strict=True
    ):
        assert loss == pytest.approx(expected_loss, rel=tolerance, abs=1e-6 * expected_trace[0][1])
        assert norm == pytest.approx(expected_norm, rel=tolerance)
    assert trace[-1][2] == pytest.approx(result.norm().item(), rel=tolerance)
    assert torch.equal(method(task_vectors, steps=40), result), "watching changes nothing"


def test_the_papers_subspace():
    """Eq. 3 as printed: the centred SVD's input subspace, another result than the released one."""
    task_vectors = CASES["tall"]
    expected, _ = reference.optmerge_full(task_vectors, paper=True)
    result = optmerge(task_vectors, subspace="centered")
    assert distance(result, expected) < 1e-9
    assert distance(optmerge(task_vectors), expected) > 1e-3


def test_table_4s_steps_from_wudi_to_optmerge():
    """WUDI, with SGD, from the mean, at low rank: the last is OptMerge for LoRA."""
    task_vectors = CASES["square"]
    for init in ("sum", "mean"):
        expected, _ = reference.wudi(
            task_vectors, optimizer="sgd", learning_rate=0.1, momentum=0.5, init=init, steps=50
        )
        options = {"optimizer": "sgd", "learning_rate": 0.1, "momentum": 0.5, "steps": 50}
        assert distance(wudi(task_vectors, init=init, **options), expected) < 1e-9
    same = optmerge(task_vectors, preset="lora", subspace="whole", rank_ratio=1.0)
    start_from_mean = wudi(task_vectors, init="mean", optimizer="sgd", learning_rate=1e-4)
    assert torch.equal(start_from_mean, same)


def test_hand_computed():
    """1×1 matrices 1 and 3: weights 1 and 1/9, so C = 2, D = 1 + 3 = 4, optimum τ = 2."""
    task_vectors = torch.tensor([1.0, 3.0], dtype=torch.float64).view(2, 1, 1)
    form = interference(task_vectors, task_vectors, task_vectors)
    assert form.C.item() == pytest.approx(2) and form.D.item() == pytest.approx(4)
    assert form.loss(torch.full((1, 1), 2.0).double()) == pytest.approx(1 + 1)
    assert form.gradient(torch.full((1, 1), 3.0).double()).item() == pytest.approx(4)
    # One step of SGD from the sum 4 at rate 0.1: 4 − 0.1·2·(4·2 − 4) = 3.2; Adam moves by its rate.
    assert wudi(task_vectors, optimizer="sgd", learning_rate=0.1, steps=1).item() == (
        pytest.approx(3.2)
    )
    assert wudi(task_vectors, learning_rate=0.1, steps=1).item() == pytest.approx(3.9)
    assert wudi(task_vectors, steps=0).item() == 4
    assert aswudi(task_vectors).item() == pytest.approx(2)
    expected = 4 + (2 - 4) * (1 - math.exp(-0.5 * 2))
    assert swudi(task_vectors, exp_time=0.5, rank_ratio=1.0).item() == pytest.approx(expected)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("preset", PRESETS)
def test_the_quadratic_form_is_the_loss(case, preset):
    task_vectors = CASES[case]
    targets, subspaces = targets_and_subspaces(task_vectors, PRESETS[preset])
    form = interference(task_vectors, targets, subspaces)
    tau = torch.randn(task_vectors.shape[1:]).double().mul(1e-3).requires_grad_()
    loss = reference.interference_loss(tau, task_vectors, targets, subspaces)
    loss.backward()
    assert form.loss(tau.detach()) == pytest.approx(loss.item(), rel=1e-9)
    assert distance(form.gradient(tau.detach()), tau.grad) < 1e-9


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["swudi", "aswudi"])
def test_spectral_variants_equal_their_formula(name, case, dtype):
    expected = getattr(reference, name)(CASES[case])
    result = METHODS[name](CASES[case].to(dtype))
    assert result.dtype == dtype
    assert distance(result.double(), expected) < {torch.float32: 1e-4, torch.float64: 1e-7}[dtype]


@pytest.mark.parametrize("init", ["sum", "mean"])
@pytest.mark.parametrize("shrink", [1e-3, 0.1, 10.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_ridge_is_the_penalised_least_squares_solution(case, dtype, shrink, init):
    task_vectors = CASES[case].to(dtype)
    result = wudi(task_vectors, optimizer="ridge", shrink=shrink, init=init)
    expected = reference.ridge(CASES[case], shrink, init)
    assert distance(result, expected.to(dtype)) < TOLERANCE[dtype]


def test_ridge_by_hand_and_at_its_ends():
    """1 and 3 have C = 2, D = 4, sum 4: half of C's eigenvalue as μ gives (4 + 1·4) / (2 + 1)."""
    task_vectors = torch.tensor([1.0, 3.0], dtype=torch.float64).view(2, 1, 1)
    merged = wudi(task_vectors, optimizer="ridge", shrink=0.5)
    assert merged.item() == pytest.approx(8 / 3)
    task_vectors = CASES["tall"]
    start = task_vectors.sum(0)
    assert distance(wudi(task_vectors, optimizer="ridge", shrink=1e12), start) < 1e-9
    minimum = wudi(task_vectors, optimizer="ridge", shrink=1e-12)
    form = interference(task_vectors, task_vectors, task_vectors)
    assert form.gradient(minimum).norm() < 1e-9 * form.gradient(start).norm()


def test_ridge_shows_its_start_and_its_end():
    trace, task_vectors = [], CASES["wide"]
    options = {"preset": "lora", "optimizer": "ridge"}
    result = optmerge(task_vectors, on_step=lambda *step: trace.append(step), **options)
    targets, subspaces = targets_and_subspaces(task_vectors, PRESETS["lora"])
    form = interference(task_vectors, targets, subspaces)
    for number, tau in enumerate((task_vectors.mean(0), result)):
        step, loss, norm = trace[number]
        assert (step, norm) == (number, pytest.approx(tau.norm().item()))
        assert loss == pytest.approx(form.loss(tau), rel=1e-6)
    assert len(trace) == 2 and trace[1][1] < trace[0][1]
    with pytest.raises(ValueError, match="shrink is 0; it must be positive"):
        optmerge(task_vectors, optimizer="ridge", shrink=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*REFERENCES])
def test_one_expert_is_left_alone(name, dtype):
    """Truncation apart, one expert has nothing to interfere with, whatever Adam is given."""
    method, _ = REFERENCES[name]
    task_vectors = CASES["one expert"].to(dtype)
    options = {} if name == "wudi" else {"rank_ratio": 1.0}
    assert torch.equal(method(task_vectors, learning_rate=1e-3, **options), task_vectors[0])
    assert torch.equal(method(task_vectors, optimizer="ridge", **options), task_vectors[0])


def test_experts_in_other_rows_and_columns_do_not_interfere():
    """Then the sum is already the optimum of WUDI, with loss 0, and nothing moves."""
    task_vectors = torch.zeros(2, 8, 6)
    task_vectors[0, :4, :3] = experts((4, 3), count=1, dtype=torch.float32)
    task_vectors[1, 4:, 3:] = experts((4, 3), count=1, seed=1, dtype=torch.float32)
    trace = []
    merged = wudi(task_vectors, on_step=lambda *step: trace.append(step))
    assert distance(merged, task_vectors.sum(0)) < 1e-6
    assert distance(ridge(task_vectors), task_vectors.sum(0)) < 1e-6
    assert trace[-1][1] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", [*REFERENCES, "swudi", "aswudi", "ridge"])
def test_the_order_of_experts_does_not_matter(name):
    method = named(name)
    task_vectors = CASES["square"]
    assert distance(method(task_vectors.flip(0)), method(task_vectors)) < 1e-9


@pytest.mark.parametrize("name", ["lora", "modality", "swudi", "aswudi", "ridge"])
@given(factor=st.floats(1e-3, 1e3))
@settings(max_examples=10, deadline=None)
def test_without_adam_scaled_experts_give_a_scaled_result(name, factor):
    method = named(name)
    task_vectors = CASES["tall"]
    assert distance(method(factor * task_vectors), factor * method(task_vectors)) < 1e-8


def test_a_learning_rate_in_rms_units_follows_the_size():
    task_vectors = CASES["tall"]
    rms = task_vectors.square().mean().sqrt().item()
    assert torch.equal(
        optmerge(task_vectors, learning_rate=0.01, learning_rate_unit="rms"),
        optmerge(task_vectors, learning_rate=0.01 * rms),
    )
    merged = wudi(task_vectors, learning_rate=0.01, learning_rate_unit="rms")
    scaled = wudi(8 * task_vectors, learning_rate=0.01, learning_rate_unit="rms")
    assert distance(scaled, 8 * merged) < 1e-2  # Adam's eps of 1e-8 is still absolute
    assert distance(wudi(8 * task_vectors), 8 * wudi(task_vectors)) > 1e-1


@pytest.mark.parametrize("start", ["sum", "mean", "zero"])
def test_zero_steps_leave_the_start(start):
    task_vectors = CASES["tall"]
    expected = {"sum": task_vectors.sum(0), "mean": task_vectors.mean(0),
                "zero": torch.zeros_like(task_vectors[0])}[start]  # fmt: skip
    for preset in PRESETS:
        assert torch.equal(optmerge(task_vectors, preset=preset, init=start, steps=0), expected)


def test_every_override_changes_the_result():
    task_vectors = CASES["tall"]
    overrides = {
        "center": False, "subspace": "whole", "init": "mean", "optimizer": "sgd",
        "learning_rate": 2e-5, "learning_rate_unit": "rms", "steps": 10, "rank_ratio": 0.1,
    }  # fmt: skip
    plain = optmerge(task_vectors)
    for name, value in overrides.items():
        assert not torch.equal(optmerge(task_vectors, **{name: value}), plain), name
    lora = optmerge(task_vectors, preset="lora")
    assert not torch.equal(optmerge(task_vectors, preset="lora", momentum=0.1), lora)


@pytest.mark.parametrize("experts_count", range(1, 9))
def test_the_default_rank_is_the_smaller_side_over_experts(experts_count):
    task_vectors = experts((7, 6), count=experts_count)
    _, subspaces = targets_and_subspaces(task_vectors, PRESETS["lora"])
    assert subspaces.shape[1] == (7 if experts_count == 1 else max(6 // experts_count, 1))


def test_the_modality_rank_is_a_fifth_as_an_integer_division():
    for side in range(1, 200):
        assert int(PRESETS["modality"].rank_ratio * side) == side // 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "lara"}, "preset is 'lara'; valid are 'full', 'lora', 'modality'"),
        ({"subspace": "half"}, "valid are 'uncentered', 'centered', 'whole'"),
        ({"init": "max"}, "'sum', 'mean', 'zero'"),
        ({"optimizer": "lbfgs"}, "'adam', 'sgd'"),
        ({"learning_rate_unit": "std"}, "'absolute', 'rms'"),
        ({"rank_ratio": 0.0}, "rank_ratio is 0.0"),
        ({"rank_ratio": 1.5}, "rank_ratio is 1.5"),
        ({"momentum": 1.0}, "momentum is 1.0"),
        ({"steps": -1}, "negative"),
        ({"lr": 1e-3}, "optmerge has no option 'lr'; its options are preset, center"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        optmerge(CASES["tall"], **options)


def test_gradients_of_the_input_are_not_followed():
    task_vectors = CASES["tall"].clone().requires_grad_()
    assert not optmerge(task_vectors, steps=2).requires_grad
    assert task_vectors.grad is None


@pytest.mark.parametrize("name", ["wudi", "optmerge", "swudi", "aswudi"])
def test_other_shapes_get_the_mean(name):
    vectors = torch.randn(3, 7)
    assert torch.equal(METHODS[name](vectors), vectors.mean(0))


def test_the_settings_are_the_published_ones():
    task_vectors = CASES["tall"]
    assert torch.equal(minimise_interference(task_vectors, PRESETS["full"]), optmerge(task_vectors))
    published = {name: (p.optimizer, p.learning_rate, p.steps) for name, p in PRESETS.items()}
    assert published == {
        "full": ("adam", 1e-5, 300), "lora": ("sgd", 1e-4, 300), "modality": ("sgd", 5e-2, 300),
    }  # fmt: skip


def test_a_randomized_svd_merges_low_rank_experts_as_the_exact_one_does():
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(3, *s, generator=generator) for s in ((120, 8), (8, 90)))
    stack = 1e-3 * (left @ right)
    exact = optmerge(stack, preset="lora")
    found = optmerge(stack, preset="lora", svd="randomized")
    assert torch.linalg.norm(found - exact) < 1e-5 * torch.linalg.norm(exact)
    noisy = stack + 1e-3 * torch.randn(stack.shape, generator=generator)
    exact = optmerge(noisy, preset="lora")
    found = optmerge(noisy, preset="lora", svd="randomized")
    assert 1e-5 < torch.linalg.norm(found - exact) / torch.linalg.norm(exact) < 0.05
    with pytest.raises(ValueError, match="svd is 'quick'; valid are 'exact', 'randomized'"):
        optmerge(stack, svd="quick")
