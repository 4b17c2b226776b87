"""Every method against a hand-computed case, the slow reference and its invariants."""

import inspect

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optmerge_core.methods.averages import task_arithmetic, weight_average
from optmerge_core.methods.dare import dare, dare_task_arithmetic, dare_ties
from optmerge_core.methods.iso_c import iso_c
from optmerge_core.methods.registry import METHODS, check_options
from optmerge_core.methods.ties import ties, trim_thresholds
from optmerge_core.methods.tsv import nearest_orthonormal, tsv

NAMES = [
    "weight_average", "task_arithmetic", "ties", "dare_task_arithmetic", "dare_ties", "tsv",
    "iso_c", "wudi", "optmerge", "swudi", "aswudi",
]  # fmt: skip
RANDOM = ["dare_task_arithmetic", "dare_ties"]
SHAPES = {"tall": (4, 30, 8), "wide": (4, 8, 30), "square": (3, 12, 12), "crowded": (5, 9, 3)}


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def call(name, task_vectors, **options):
    """The method, its randomness (if any) fixed expert by expert."""
    if name in RANDOM:
        options.setdefault("generator", generators(*range(len(task_vectors))))
    return METHODS[name](task_vectors, **options)


# Averages


def test_average_and_sum_by_hand():
    task_vectors = torch.tensor([[1.0, -2.0], [3.0, 4.0]])
    assert weight_average(task_vectors).tolist() == [2, 1]
    assert task_arithmetic(task_vectors).tolist() == [4, 2]


# TIES


def test_ties_by_hand():
    """k = int(0.6·5) = 3: kept are magnitudes ≥ 3 of the first, ≥ 3 of the second expert."""
    task_vectors = torch.tensor([[1.0, -2.0, 3.0, 4.0, -5.0], [5.0, 1.0, 2.0, -3.0, -4.0]])
    assert trim_thresholds(task_vectors, density=0.4).tolist() == [3, 3]
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
    whole = trim_thresholds(torch.cat([task_vectors.flatten(1), 9 * randn(2, 70)], dim=1), 0.2)
    trimmed = torch.where(task_vectors.abs() >= whole.view(2, 1, 1), task_vectors, 0)
    expected = reference.ties(trimmed, density=1.0)
    torch.testing.assert_close(ties(task_vectors, thresholds=whole), expected)
    with pytest.raises(ValueError, match="each of the 2 experts"):
        ties(task_vectors, thresholds=torch.zeros(3))


def test_ties_trims_tensors_too_large_for_torch_quantile():
    task_vectors = torch.arange(1, 2**24 + 11, dtype=torch.float64).view(1, -1)
    k = int(0.8 * task_vectors.shape[1])
    assert trim_thresholds(task_vectors, 0.2).item() == k


# DARE


def test_dare_drops_at_its_rate_and_keeps_the_mean():
    dropped = dare(torch.ones(2, 300, 300), 0.3, torch.Generator().manual_seed(0))
    assert set(dropped.unique().tolist()) == {0.0, torch.tensor(1 / 0.7).item()}
    assert (dropped == 0).float().mean().item() == pytest.approx(0.3, abs=0.005)
    assert dropped.mean().item() == pytest.approx(1, abs=0.01)
    assert not torch.equal(dropped[0], dropped[1])


def test_dare_depends_on_the_experts_generator_not_its_position():
    task_vectors = randn(3, 6, 5)
    forward = dare(task_vectors, 0.5, generators(1, 2, 3))
    backward = dare(task_vectors.flip(0), 0.5, generators(3, 2, 1))
    assert torch.equal(forward.flip(0), backward)
    with pytest.raises(ValueError, match="2 generators for 3 experts"):
        dare(task_vectors, 0.5, generators(1, 2))


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


# TSV and Iso-C


@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
@pytest.mark.parametrize("name", ["tsv", "iso_c"])
def test_spectral_methods_equal_the_reference(name, shape):
    task_vectors = randn(*shape, dtype=torch.float64)
    expected = getattr(reference, name)(task_vectors)
    torch.testing.assert_close(METHODS[name](task_vectors), expected, rtol=1e-6, atol=1e-9)
    single = METHODS[name](task_vectors.float())
    torch.testing.assert_close(single.double(), expected, rtol=1e-4, atol=1e-5)


def test_tsv_by_hand():
    """Rank 1 each. The outputs e1 and (e1 + e2)/√2 turn by 22.5° to be orthogonal."""
    task_vectors = torch.zeros(2, 2, 2, dtype=torch.float64)
    task_vectors[0, 0, 0] = 2.0
    task_vectors[1, :, 1] = 3 / 2**0.5
    cos, sin = torch.tensor(torch.pi / 8).double().cos(), torch.tensor(torch.pi / 8).double().sin()
    expected = torch.stack([torch.stack([2 * cos, 3 * sin]), torch.stack([-2 * sin, 3 * cos])])
    torch.testing.assert_close(tsv(task_vectors), expected)


def test_iso_c_by_hand():
    """Singular values 3 and 1 become 2 and 2."""
    task_vectors = torch.diag_embed(torch.tensor([[1.0, -1.0], [2.0, 0.0]]))
    torch.testing.assert_close(iso_c(task_vectors), torch.diag(torch.tensor([2.0, -2.0])))


def test_tsv_of_orthogonal_experts_is_their_sum():
    task_vectors = torch.zeros(2, 8, 6)
    task_vectors[0, :4, :3], task_vectors[1, 4:, 3:] = randn(4, 3), randn(4, 3, seed=1)
    torch.testing.assert_close(tsv(task_vectors), task_vectors.sum(0))


def test_tsv_counts_a_shared_direction_once():
    """Equal experts: the one that is left has no arbitrary partner."""
    expert = randn(8, 6)
    U, S, Vh = reference.svd(expert, 3)
    once = U @ torch.diag(S) @ Vh
    for factor in (1, 3, -1):
        merged = tsv(torch.stack([expert, factor * expert]))
        torch.testing.assert_close(merged, (1 + factor) / 2 * once, rtol=1e-4, atol=1e-5)


def test_rank_deficient_spectral_methods_stay_in_their_span():
    left, right = randn(20, 2, dtype=torch.float64), randn(2, 15, seed=1, dtype=torch.float64)
    task_vectors = torch.stack([left[:, :1] @ right[:1], left[:, 1:] @ right[1:]])
    off_rows = torch.eye(20).double() - left @ torch.linalg.pinv(left)
    off_columns = torch.eye(15).double() - torch.linalg.pinv(right) @ right
    for method in (tsv, iso_c):
        merged = method(task_vectors)
        assert merged.norm() > 1
        assert (off_rows @ merged).norm() < 1e-6 and (merged @ off_columns).norm() < 1e-6


def test_nearest_orthonormal():
    matrix = randn(9, 4, dtype=torch.float64)
    nearest = nearest_orthonormal(matrix)
    torch.testing.assert_close(nearest.mT @ nearest, torch.eye(4).double())
    torch.testing.assert_close(nearest_orthonormal(matrix.mT), nearest.mT)
    for seed in range(20):
        other = torch.linalg.qr(nearest + 0.1 * randn(9, 4, seed=seed).double()).Q
        assert (other - matrix).norm() > (nearest - matrix).norm()


# What all methods have in common


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES.values(), (3, 7), (2, 2, 3, 4), (1, 5, 4), (2, 1, 1)])
@pytest.mark.parametrize("name", NAMES)
def test_shape_dtype_and_input(name, shape, dtype):
    task_vectors = randn(*shape, dtype=dtype)
    before = task_vectors.clone()
    merged = call(name, task_vectors)
    assert merged.shape == shape[1:] and merged.dtype == dtype
    assert merged.isfinite().all()
    assert torch.equal(task_vectors, before)
    assert torch.equal(call(name, task_vectors), merged)


@pytest.mark.parametrize("name", NAMES)
def test_zeros_stay_zeros_and_never_become_nan(name):
    assert torch.equal(call(name, torch.zeros(3, 6, 4)), torch.zeros(6, 4))
    one_zero = randn(3, 6, 4)
    one_zero[1] = 0
    assert call(name, one_zero).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_experts_does_not_matter(name):
    task_vectors = randn(4, 20, 12, dtype=torch.float64)
    order = [2, 0, 3, 1]
    options = {"generator": generators(*order)} if name in RANDOM else {}
    merged = call(name, task_vectors[order], **options)
    torch.testing.assert_close(merged, call(name, task_vectors))


@given(factor=st.floats(1e-3, 1e3))
@settings(max_examples=10, deadline=None)
@pytest.mark.parametrize("name", NAMES[:7])
def test_scaled_experts_give_a_scaled_result(name, factor):
    task_vectors = randn(3, 8, 6, dtype=torch.float64)
    merged, scaled = call(name, task_vectors), call(name, factor * task_vectors)
    torch.testing.assert_close(scaled, factor * merged, rtol=1e-6, atol=1e-9 * factor)


@pytest.mark.parametrize("name", ["weight_average", "task_arithmetic", "tsv"])
def test_one_expert_is_itself(name):
    task_vectors = randn(1, 9, 7)
    torch.testing.assert_close(METHODS[name](task_vectors), task_vectors[0])


@pytest.mark.parametrize("name", ["tsv", "iso_c", "wudi", "optmerge", "swudi", "aswudi"])
def test_methods_on_matrices_give_others_the_mean(name):
    for shape in ((3, 7), (3, 2, 3, 4)):
        assert torch.equal(METHODS[name](randn(*shape)), randn(*shape).mean(0))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("task_vectors", "message"),
    [
        (torch.zeros(2, 3, 3, dtype=torch.float16), "float16"),
        (torch.zeros(2, 3, 3, dtype=torch.int64), "int64"),
        (torch.zeros(0, 3, 3), "at least one"),
        (torch.tensor(1.0), "at least one"),
    ],
)
def test_wrong_task_vectors_are_refused(name, task_vectors, message):
    with pytest.raises(ValueError, match=message):
        METHODS[name](task_vectors)


# The table


def test_the_table_has_the_contracts_methods():
    assert list(METHODS) == NAMES
    assert "lines" not in METHODS and METHODS.get("lines") is None
    with pytest.raises(ValueError, match="no merge method 'lines'; methods are weight_average, .*"):
        METHODS["lines"]


@pytest.mark.parametrize("name", NAMES)
def test_methods_keep_their_names_signatures_and_docstrings(name):
    method = METHODS[name]
    assert method.__name__ == name and method.__doc__
    task_vectors, *options = inspect.signature(method).parameters.values()
    assert task_vectors.name == "task_vectors"
    assert all(option.kind is option.KEYWORD_ONLY for option in options)


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_option_is_named_with_the_valid_ones(name):
    options = list(inspect.signature(METHODS[name]).parameters)[1:]
    message = f"{name} has no option 'sparsity'.*{', '.join(options)}"
    with pytest.raises(ValueError, match=message):
        METHODS[name](torch.zeros(1, 2, 2), sparsity=0.5)
    with pytest.raises(ValueError, match=message):
        check_options(name, {"sparsity": 0.5})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ties", {"density": 0}, r"density is 0; it must lie in \(0, 1\]"),
        ("ties", {"density": 1.2}, "density"),
        ("dare_ties", {"density": float("nan")}, "density"),
        ("dare_task_arithmetic", {"drop_rate": 1}, r"drop_rate is 1; it must lie in \[0, 1\)"),
        ("dare_ties", {"drop_rate": -0.1}, "drop_rate"),
        ("optmerge", {"preset": "all"}, "preset"),
        ("swudi", {"rank_ratio": 0}, "rank_ratio"),
        ("lines", {}, "no merge method"),
    ],
)
def test_wrong_values_are_refused_before_any_work(name, options, message):
    with pytest.raises(ValueError, match=message):
        check_options(name, options)


def test_checking_options_has_no_effects():
    generator = torch.Generator().manual_seed(3)
    state = generator.get_state()
    check_options("dare_ties", {"drop_rate": 0.5, "generator": generator})
    assert torch.equal(generator.get_state(), state)
    check_options("optmerge", {"on_step": pytest.fail})


@pytest.mark.parametrize("size", [1, 6, 40])
def test_ties_in_blocks_equals_ties_entry_by_entry(monkeypatch, size):
    """Small whole numbers: many experts cancel exactly, so blocks are gone through twice."""
    monkeypatch.setattr("optmerge_core.methods.ties.BLOCK", 6)
    stack = torch.randint(-2, 3, (4, size), generator=torch.Generator().manual_seed(size)).float()
    for density in (0.2, 0.6, 1.0):
        expected = reference.ties(stack, density)
        assert torch.equal(METHODS["ties"](stack, density=density), expected)
        assert torch.equal(METHODS["ties"](-stack, density=density), -expected)
