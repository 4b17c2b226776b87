"""What all merge methods have in common, or several of them, and the table of methods."""

import inspect
import re

import pytest
import reference
import torch
from cases import SHAPES, generators, randn
from hypothesis import given, settings
from hypothesis import strategies as st

from optmerge_core.methods.iso_c import iso_c
from optmerge_core.methods.registry import METHODS, check_options
from optmerge_core.methods.tsv import tsv

NAMES = [
    "weight_average", "task_arithmetic", "ties", "dare_task_arithmetic", "dare_ties", "tsv",
    "iso_c", "wudi", "optmerge", "swudi", "aswudi",
]  # fmt: skip


RANDOM = ["dare_task_arithmetic", "dare_ties"]


def call(name, task_vectors, **options):
    """The method, its randomness (if any) fixed expert by expert."""
    if name in RANDOM:
        options.setdefault("generator", generators(*range(len(task_vectors))))
    return METHODS[name](task_vectors, **options)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
@pytest.mark.parametrize("name", ["tsv", "iso_c"])
def test_spectral_methods_equal_the_reference(name, shape):
    task_vectors = randn(*shape, dtype=torch.float64)
    expected = getattr(reference, name)(task_vectors)
    torch.testing.assert_close(METHODS[name](task_vectors), expected, rtol=1e-6, atol=1e-9)
    single = METHODS[name](task_vectors.float())
    torch.testing.assert_close(single.double(), expected, rtol=1e-4, atol=1e-5)


def test_rank_deficient_spectral_methods_stay_in_their_span():
    left, right = randn(20, 2, dtype=torch.float64), randn(2, 15, seed=1, dtype=torch.float64)
    task_vectors = torch.stack([left[:, :1] @ right[:1], left[:, 1:] @ right[1:]])
    off_rows = torch.eye(20).double() - left @ torch.linalg.pinv(left)
    off_columns = torch.eye(15).double() - torch.linalg.pinv(right) @ right
    for method in (tsv, iso_c):
        merged = method(task_vectors)
        assert merged.norm() > 1
        assert (off_rows @ merged).norm() < 1e-6 and (merged @ off_columns).norm() < 1e-6


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
def test_a_methods_file_names_its_paper_first(name):
    file = inspect.getmodule(inspect.unwrap(METHODS[name]))
    assert re.search(r"\(arXiv \d{4}\.\d{5}\)", file.__doc__.splitlines()[0])


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
