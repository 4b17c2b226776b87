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
    for shape in ((3, 7), (3, 2, 2, 3, 4)):
        assert torch.equal(METHODS[name](randn(*shape)), randn(*shape).mean(0))


@pytest.mark.parametrize("name", NAMES)
def test_a_stack_of_matrices_is_merged_matrix_by_matrix(name):
    task_vectors, drawn = randn(3, 2, 5, 4), {}
    if name in RANDOM:  # for one matrix after the other
        drawn["generator"] = generators(0, 1, 2)
    alone = [call(name, matrix, **drawn) for matrix in task_vectors.unbind(1)]
    assert torch.equal(call(name, task_vectors), torch.stack(alone))


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


EIGHTHS = [
    [[3, -1, 4, 1], [-5, 9, 2, -6], [5, 3, -5, 8]],
    [[-2, 7, 1, 8], [2, -8, 1, -8], [2, 8, 4, 5]],
]
"""Two task vectors, times 8."""
GOLDEN = [
    ("weight_average", {}, [
        [0.0625, 0.375, 0.3125, 0.5625], [-0.1875, 0.0625, 0.1875, -0.875],
        [0.4375, 0.6875, -0.0625, 0.8125],
    ]),
    ("task_arithmetic", {}, [
        [0.125, 0.75, 0.625, 1.125], [-0.375, 0.125, 0.375, -1.75], [0.875, 1.375, -0.125, 1.625],
    ]),
    ("ties", {}, [[0, 0, 0, 1], [-0.625, 1.125, 0, -0.875], [0.625, 1, -0.625, 1]]),
    ("ties", {"rule": "mergekit"}, [[0, 0, 0, 1], [0, 1.125, 0, 0], [0, 0, 0, 1]]),
    ("ties", {"weights": [1, 3]}, [
        [0, 0, 0, 1], [-0.625, -1, 0, -0.9375], [0.625, 1, -0.625, 1],
    ]),
    ("ties", {"normalize": False, "density": 0.5}, [
        [0, 0.875, 0.5, 1], [-0.625, 1.125, 0, -1.75], [0.625, 1, -0.625, 1.625],
    ]),
    ("dare_task_arithmetic", {}, [
        [0.15625, 0.9375, 0.78125, 1.40625], [0.3125, 0.15625, 0.46875, -0.9375],
        [1.09375, 0.46875, -0.15625, 2.03125],
    ]),
    ("dare_task_arithmetic", {"drop_rate": 0.5}, [
        [0.25, 0, 0.25, 0.25], [0.5, 0.25, 0, -1.5], [1.75, 0, -0.25, 3.25],
    ]),
    ("dare_ties", {}, [
        [0, 1.09375, 0, 1.25], [0, 1.40625, 0, -0.9375], [0.78125, 0, -0.78125, 1.015625],
    ]),
    ("dare_ties", {"drop_rate": 0.5}, [
        [-0.5, 0, 0, 0], [0.5, 2.25, 0, -1.5], [0.875, 0, -1.25, 1.625],
    ]),
    ("tsv", {}, [
        [-0.600150702, 1.86653934, 0.496152875, 0.850649091],
        [-0.603127941, 0.0362457113, 0.309636291, -1.26188641],
        [0.439423192, 0.0815946107, -0.214497766, 1.04365447],
    ]),
    ("iso_c", {}, [
        [-0.422621063, 0.446668883, 1.29186974, 0.75297078],
        [-0.0872527529, 0.786654222, 0.473459305, -1.32793541],
        [0.83525225, 1.21115563, -0.440229665, 0.505635885],
    ]),
    ("wudi", {}, [
        [0.122005603, 0.747008095, 0.627994459, 1.12201582],
        [-0.372004456, 0.12207836, 0.372002036, -1.75295905],
        [0.87796765, 1.37200344, -0.127979894, 1.62200257],
    ]),
    ("wudi", {"optimizer": "sgd"}, [
        [0.118624739, 0.737846521, 0.630614455, 1.11546593],
        [-0.36875778, 0.123101995, 0.362335204, -1.75222916],
        [0.875868944, 1.33186606, -0.126294374, 1.59074405],
    ]),
    ("wudi", {"optimizer": "ridge"}, [
        [-0.608204189, 0.221517468, 1.12570436, 1.3686195],
        [0.348539492, 0.521055618, -0.681936875, -2.26417569],
        [0.813158588, 0.642258007, -0.169247122, 1.19352573],
    ]),
    ("optmerge", {}, [
        [0.127987528, 0.747017337, 0.62201431, 1.12202551],
        [-0.372004347, 0.122006409, 0.372005099, -1.75298952],
        [0.872006899, 1.37200268, -0.122041328, 1.62200394],
    ]),
    ("optmerge", {"preset": "lora"}, [
        [0.0367234151, 0.580322725, 0.346667023, 0.74304958],
        [-0.249577097, -0.142853472, 0.197890118, -1.24547092],
        [0.518394486, 0.676599334, -0.104650353, 0.97480115],
    ]),
    ("optmerge", {"preset": "modality"}, [
        [-1.04339757, 0.120346949, 0.985359472, 1.52925898],
        [0.229986537, 0.28882358, -0.610749265, -2.21293558],
        [-0.242627865, -0.220285684, 0.538972241, 1.83244069],
    ]),
    ("optmerge", {"subspace": "centered"}, [
        [0.127993996, 0.747006004, 0.622006004, 1.122006],
        [-0.377976614, 0.127976614, 0.377976612, -1.74702339],
        [0.877995087, 1.37200491, -0.127995087, 1.62200491],
    ]),
    ("optmerge", {"optimizer": "ridge"}, [
        [0.19492859, 0.586627778, 0.57274821, 1.08815209],
        [-0.176129962, -0.318977828, 0.228521062, -1.83104536],
        [0.767607273, 1.018701, -0.107132007, 0.982892878],
    ]),
    ("swudi", {}, [
        [0.183906061, 0.608885803, 0.908327451, 0.922132708],
        [-0.666192249, 0.0478287209, -0.553332177, -1.74131879],
        [0.914101977, 0.661968459, -0.223452759, 1.11557363],
    ]),
    ("swudi", {"exp_time": 1.0, "rank_ratio": 0.5}, [
        [0.0990178027, 0.655875853, 0.641181743, 0.984838408],
        [-0.33066414, 0.0545842171, 0.348148528, -1.7186994],
        [0.901779528, 0.911129547, -0.139830905, 1.26480283],
    ]),
    ("aswudi", {}, [
        [-1.13997132, -0.0707295147, 1.38716683, 1.67921537],
        [0.935728054, 0.870177977, -1.1327382, -2.65740521],
        [0.738994186, 0.572076495, -0.160117205, 1.21571211],
    ]),
]  # fmt: skip
"""Method, options, and what version 0.1.0 makes of `EIGHTHS` / 8 with them."""


def test_every_method_has_a_golden_value_by_its_defaults():
    assert [name for name, options, _ in GOLDEN if not options] == NAMES


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-8), (torch.float32, 2e-6)])
@pytest.mark.parametrize("name, options, expected", GOLDEN)
def test_numbers_stay_those_of_the_first_version(name, options, expected, dtype, tolerance):
    """A merge may be repeated by a later version: what it writes must not have moved."""
    random = {"generator": generators(1, 2)} if name in RANDOM else {}
    merged = METHODS[name](torch.tensor(EIGHTHS, dtype=dtype) / 8, **options, **random)
    expected = torch.tensor(expected, dtype=dtype)
    torch.testing.assert_close(merged, expected, rtol=0, atol=tolerance)


def test_defaults_are_the_contracts():
    """Those that golden values do not show are here too: of another optimizer, say."""
    descent = {
        "init": "sum", "optimizer": "adam", "learning_rate": 1e-5, "learning_rate_unit": "absolute",
        "momentum": 0.9, "steps": 300, "shrink": 0.1, "on_step": None,
    }  # fmt: skip
    trimming = {"density": 0.2, "thresholds": None, "weights": None, "normalize": True}
    trimming["rule"] = "released"
    dropping = {"drop_rate": 0.2, "generator": None}
    contract = {
        "weight_average": {"weights": None},
        "task_arithmetic": {"weights": None},
        "ties": trimming,
        "dare_task_arithmetic": dropping | {"weights": None},
        "dare_ties": dropping | trimming,
        "tsv": {"null_directions": "zero"},
        "iso_c": {"null_directions": "zero", "mean_over": "all"},
        "wudi": descent,
        "optmerge": {"preset": "full", "center": None, "subspace": None, "rank_ratio": None}
        | dict.fromkeys(descent),
        "swudi": {"exp_time": 300.0, "rank_ratio": 0.65},
        "aswudi": {},
    }
    for name, method in METHODS.items():
        options = list(inspect.signature(method).parameters.values())[1:]
        expected = contract[name] | {"then": None}
        assert {option.name: option.default for option in options} == expected
