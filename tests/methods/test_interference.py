"""The interference as a quadratic form, and its descents against autograd and torch.optim."""

import pytest
import reference
import torch
from cases import CASES, DTYPES, TOLERANCE, distance, experts
from hypothesis import given, settings
from hypothesis import strategies as st

from optmerge_core.methods.interference import fewer_rows, interference
from optmerge_core.methods.optmerge import PRESETS, optmerge, targets_and_subspaces
from optmerge_core.methods.registry import METHODS
from optmerge_core.methods.wudi import wudi

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


@pytest.mark.parametrize("rows, factored", [(9, True), (10, False)])
def test_the_products_are_the_cheaper_ones(rows, factored):
    """C (n, n) is made only where two products with L (rows, n) cost more: 2 · rows ≥ n = 20."""
    task_vectors = experts((5, 20), count=1)
    subspace = experts((rows, 20), count=1)
    form = interference(task_vectors, task_vectors, subspace)
    tau = experts((5, 20), count=1, seed=1)[0]
    gradient, loss = form.gradient(tau), form.loss(tau)
    assert form.factored == factored == ("C" not in vars(form))
    assert form.in_factors
    assert distance(gradient, 2 * (tau @ form.C - form.D)) < 1e-9
    assert loss == pytest.approx((tau * (tau @ form.C - 2 * form.D)).sum().item() + form.constant)


@pytest.mark.parametrize("dtype", DTYPES)
def test_experts_of_low_rank_have_few_rows_and_the_same_gram_matrix(dtype):
    low = (experts((40, 3), count=2) @ experts((3, 60), count=2, seed=1)).to(dtype)
    low[0, 5] *= 1e-3  # of any size
    before, written = low.clone(), fewer_rows(low)
    assert written.shape[1] < 2 * 60 / 8 and written.dtype == dtype
    assert distance(written.mT @ written, low.mT @ low) < TOLERANCE[dtype]
    assert torch.equal(low, before), "it is left as it was"
    form = interference(low, low, low)
    assert form.in_factors and form.factored
    tau = experts((40, 60), count=1, seed=2)[0].to(dtype)
    loss = reference.interference_loss(tau, low, low, low)
    assert form.loss(tau) == pytest.approx(loss.item(), rel=TOLERANCE[dtype])


def test_experts_of_full_rank_or_a_little_noise_are_left_as_they_are():
    noise = 1e-4 * experts((40, 60), count=2, seed=2)
    full, low = experts((40, 60), count=2), experts((40, 3), count=2) @ experts((3, 60), count=2)
    assert fewer_rows(full) is full and (noisy := low + noise) is fewer_rows(noisy)
    zero = torch.zeros_like(low)
    assert fewer_rows(zero).shape[1] < 10 and not fewer_rows(zero).any()


@pytest.mark.parametrize("shape", [(40, 21), (4, 21)], ids=["tall", "wide"])
@pytest.mark.parametrize("rows", [7, 8, 11])
def test_functions_of_the_eigenvalues_equal_those_of_torchs(rows, shape):
    """In factors up to 3 · 7 = 21 rows of L; above, D takes Ti Liᵀ Li, or C where 2 · 11 > 21."""
    task_vectors, subspaces = experts(shape), experts((rows, 21), seed=1)
    start = experts(shape, count=1, seed=2)[0]
    form = interference(task_vectors, iter(task_vectors), subspaces)
    assert form.in_factors == (rows == 7)
    weights = 1 / task_vectors.square().sum((1, 2), keepdim=True)
    eigenvalues, V = torch.linalg.eigh((weights * subspaces.mT @ subspaces).sum(0))
    D = (weights * task_vectors @ subspaces.mT @ subspaces).sum(0)
    response = 1 / (0.3 + form.eigenpairs[0])
    expected = D @ V / (0.3 + eigenvalues) @ V.mT
    assert distance(form.filtered(response), expected) < 1e-9
    pull, along = form.along(start)
    assert distance(pull.flip(0), (D @ V).square().sum(0)) < 1e-9
    assert distance(along.flip(0), (start @ V * (D @ V)).sum(0)) < 1e-9


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
