"""What all merge methods have in common, or several of them, and the table of methods."""

import inspect
import re

import pytest
import reference
import torch
from cases import SHAPES, fitted, generators, randn
from hypothesis import given, settings
from hypothesis import strategies as st

from optmerge_core.merging.checks import check_method
from optmerge_core.methods import BASED, DRAWN, EXPERTS, FILES
from optmerge_core.methods.iso_c import iso_c
from optmerge_core.methods.registry import METHODS, check_options
from optmerge_core.methods.tsv import tsv

NAMES = [
    "weight_average", "task_arithmetic", "ties", "dare_task_arithmetic", "dare_ties", "tsv",
    "iso_c", "wudi", "optmerge", "swudi", "aswudi", "iso_cts", "dc_merge", "ssam", "orthomerge",
    "breadcrumbs", "breadcrumbs_ties", "della", "della_linear", "sce", "model_stock", "slerp",
    "nuslerp",
]  # fmt: skip
COUNTED = [name for name in NAMES if name not in EXPERTS]
LINEAR = [name for name in COUNTED[:7] + COUNTED[11:] if name != "orthomerge"]
"""Those that scale as the task vectors do: of few methods their length is fixed, or the base's."""
ON_MATRICES = ["tsv", *COUNTED[6:15]]


def call(name, task_vectors, **options):
    """The method for as many experts as it takes, its randomness (if any) fixed one by one."""
    stack, more = fitted(name, task_vectors)
    return METHODS[name](stack, **more | options)


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


@pytest.mark.parametrize("name", COUNTED)
def test_the_order_of_experts_does_not_matter(name):
    task_vectors = randn(4, 20, 12, dtype=torch.float64)
    order = [2, 0, 3, 1]
    options = {"generator": generators(*order)} if name in DRAWN else {}
    merged = call(name, task_vectors[order], **options)
    torch.testing.assert_close(merged, call(name, task_vectors))


@given(factor=st.floats(1e-3, 1e3))
@settings(max_examples=10, deadline=None)
@pytest.mark.parametrize("name", LINEAR)
def test_scaled_experts_give_a_scaled_result(name, factor):
    task_vectors = randn(3, 8, 6, dtype=torch.float64)
    merged, scaled = call(name, task_vectors), call(name, factor * task_vectors)
    torch.testing.assert_close(scaled, factor * merged, rtol=1e-6, atol=1e-9 * factor)


@pytest.mark.parametrize("name", ["weight_average", "task_arithmetic", "tsv"])
def test_one_expert_is_itself(name):
    task_vectors = randn(1, 9, 7)
    torch.testing.assert_close(METHODS[name](task_vectors), task_vectors[0])


@pytest.mark.parametrize("name", ON_MATRICES)
def test_methods_on_matrices_give_others_the_mean(name):
    for shape in ((3, 7), (3, 2, 2, 3, 4)):
        assert torch.equal(call(name, randn(*shape)), randn(*shape).mean(0))


@pytest.mark.parametrize("name", NAMES)
def test_a_stack_of_matrices_is_merged_matrix_by_matrix(name):
    task_vectors, more = fitted(name, randn(3, 2, 5, 4))
    bases = more.pop("base", [None] * 2)  # generators draw for one matrix after the other
    alone = [
        METHODS[name](matrix, **more | ({} if base is None else {"base": base}))
        for matrix, base in zip(task_vectors.unbind(1), bases, strict=True)
    ]
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
        METHODS[name](task_vectors, **({"base": torch.zeros(3, 3)} if name in BASED else {}))


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
        ("swudi", {"preset": "modality"}, "preset is 'modality'; valid are 'full', 'lora'"),
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
BASE = [[2, 7, -1, 8], [2, -8, 1, 8], [-2, 8, 4, 5]]
"""The base's, times 8."""
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
    ("iso_cts", {}, [
        [-0.422621063, 0.446668883, 1.29186974, 0.75297078],
        [-0.0872527529, 0.786654222, 0.473459305, -1.32793541],
        [0.83525225, 1.21115563, -0.440229665, 0.505635885],
    ]),
    ("dc_merge", {}, [
        [-0.519472401, 1.61562032, 0.429455009, 0.736296274],
        [-0.52204941, 0.0313731978, 0.268011863, -1.09225093],
        [0.380351501, 0.0706258415, -0.185662817, 0.903355931],
    ]),
    ("ssam", {}, [
        [0.00282681405, 0.823067564, 0.00869242145, 0.778763008],
        [-0.0044355422, -1.2914719, -0.0136392425, -1.22195381],
        [0.00359891047, 1.04787454, 0.0110666093, 0.991468945],
    ]),
    ("orthomerge", {}, [
        [0.10038537, -0.617794306, 0.223283893, 0.522444309],
        [-0.393224551, 0.398340093, 0.325376647, -0.870073818],
        [0.19583886, 0.791538228, -0.160454788, 0.237045612],
    ]),
    ("breadcrumbs", {}, [
        [0.125, 0.875, 0.5, 1],
        [-0.375, 0.125, 0.25, -1.75],
        [0.875, 1.375, -0.125, 1.625],
    ]),
    ("breadcrumbs_ties", {}, [
        [0.375, 0.875, 0.5, 1],
        [-0.625, 1.125, 0.25, -1.75],
        [0.875, 1.375, -0.625, 1.625],
    ]),
    ("della", {}, [
        [0.441176477, 1.02941178, 0.359311741, 0.609649122],
        [-0.83333333, 1.18421053, 0.288461538, -0.967492266],
        [0.608974357, 0.814777328, -0.735294128, 0.893962853],
    ]),
    ("della_linear", {}, [
        [0.107843145, 0.837104087, 0.718623482, 1.21929824],
        [-0.499999998, 0.00773992158, 0.576923077, -1.93498453],
        [1.21794871, 1.62955466, -0.0686274639, 1.78792571],
    ]),
    ("sce", {}, [
        [0.375, 0.875, 0.294207317, 0.605182927],
        [-0.625, 1.125, 0.181402439, -0.887195122],
        [0.419207317, 0.717987805, -0.625, 0.794207317],
    ]),
    ("model_stock", {}, [
        [0.00755536371, 0.0453321823, 0.0377768186, 0.0679982734],
        [-0.0226660911, 0.00755536371, 0.0226660911, -0.105775092],
        [0.052887546, 0.0831090009, -0.00755536371, 0.0982197283],
    ]),
    ("slerp", {}, [
        [0.231497143, 0.0192089802, 0.262570612, 0.169350205],
        [-0.318785306, 0.518502857, 0.150141225, -0.312146938],
        [0.318785306, 0.306920817, -0.293644081, 0.613135511],
    ]),
    ("nuslerp", {}, [
        [0.0856754911, 0.514052946, 0.428377455, 0.77107942],
        [-0.257026473, 0.0856754911, 0.257026473, -1.19945687],
        [0.599728437, 0.942430402, -0.0856754911, 1.11378138],
    ]),
    ("iso_cts", {"common_ratio": 0.4}, [
        [-0.588558554, 0.90123957, -0.563423879, 1.17419046],
        [-0.427809821, 1.11964076, -0.20640954, -1.1728521],
        [1.31435768, 0.870862248, 0.551259473, 0.254910682],
    ]),
    ("dc_merge", {"density": 0.5, "spectrum": "ramp"}, [
        [-0.519472401, 1.61562032, 0.429455009, 0.736296274],
        [-0.52204941, 0.0313731978, 0.268011863, -1.09225093],
        [0.380351501, 0.0706258415, -0.185662817, 0.903355931],
    ]),
    ("ssam", {"rank_ratio": 0.7}, [
        [0.336792533, 0.270018102, -0.203179193, 0.991830595],
        [-0.526529345, -0.443009288, 0.317378639, -1.57018429],
        [0.347537464, 1.15708611, -0.198533261, 1.84802668],
    ]),
    ("ssam", {"rank_ratio": 0.4, "sequential": True}, [
        [0.018906344, 0.779263806, 0.0982824327, 0.870358794],
        [-0.0296658659, -1.22273961, -0.154214558, -1.36567637],
        [0.0240702918, 0.992106528, 0.125126616, 1.10808257],
    ]),
    ("orthomerge", {"side": "inputs", "residual": "tsv"}, [
        [0.209218628, -0.213535815, 0.590956403, 0.213363184],
        [-0.542795595, 0.584780015, 1.06188314, -1.01313302],
        [0.280230169, 0.118732658, -0.611560876, 0.43344665],
    ]),
    ("breadcrumbs", {"density": 0.5, "gamma": 0.2}, [
        [0.125, 0.875, 0.5, 0],
        [-0.625, 0, 0, -1.75],
        [0.625, 1, -0.125, 0.625],
    ]),
    ("breadcrumbs_ties", {"density": 0.5, "gamma": 0.2, "normalize": True}, [
        [0.375, 0.875, 0.5, 0],
        [-0.625, 0, 0, -0.875],
        [0.625, 1, -0.625, 0.625],
    ]),
    ("della", {"density": 0.5, "rescale": False}, [
        [0, 0.875, 0.5, 1],
        [-0.625, 0, 0, -1],
        [0, 1, 0, 0.8125],
    ]),
    ("sce", {"select_topk": 0.5}, [
        [0.375, 0.875, 0, 0.637755102],
        [-0.625, 1.125, 0, 0],
        [0, 0, -0.625, 0],
    ]),
    ("model_stock", {"filter_wise": True}, [
        [-0.00225450012, -0.0135270007, -0.0112725006, -0.0202905011],
        [0.111785463, -0.037261821, -0.111785463, 0.521665494],
        [0.278287234, 0.437308511, -0.0397553192, 0.516819149],
    ]),
    ("slerp", {"t": 0.3}, [
        [0.147376458, 0.0316272443, 0.157881073, 0.126367228],
        [-0.189451618, 0.294667866, 0.0947399837, -0.168357338],
        [0.189451618, 0.210574247, -0.168385688, 0.3894929],
    ]),
    ("nuslerp", {"of": "weights", "weights": [1, 3], "flatten": False}, [
        [-0.0872060514, 0.658337558, 0.222676369, 0.822154616],
        [0.0874133125, -0.988154657, 0.304911777, -0.883908835],
        [0.348770499, 0.89933421, 0.235664358, 0.763740317],
    ]),
    ("task_arithmetic", {"weights": [1, 3], "normalize": True}, [
        [-0.09375, 0.625, 0.21875, 0.78125],
        [0.03125, -0.46875, 0.15625, -0.9375],
        [0.34375, 0.84375, 0.21875, 0.71875],
    ]),
]  # fmt: skip
"""Method, options, and what version 0.1.0 makes of `EIGHTHS` / 8 with them."""


def test_every_method_has_a_golden_value_by_its_defaults():
    assert [name for name, options, _ in GOLDEN if not options] == NAMES


def test_the_short_tables_are_those_of_the_functions():
    """They are read without torch: who gets the base, who draws, how many experts."""
    options = {name: inspect.signature(METHODS[name]).parameters for name in FILES}
    assert list(BASED) == [name for name in FILES if "base" in options[name]]
    assert list(DRAWN) == [name for name in FILES if "generator" in options[name]]
    for name, count in EXPERTS.items():
        for wrong in {1, 2, 3} - {count}:
            message = f"{name} merges .*; {wrong} experts are given"
            with pytest.raises(ValueError, match=message):
                METHODS[name](torch.zeros(wrong, 3, 3))
            with pytest.raises(ValueError, match=message):
                check_options(name, {}, wrong)


@pytest.mark.parametrize("name", BASED)
def test_the_bases_own_tensor_is_asked_for(name):
    stack, more = fitted(name, randn(3, 6, 4))
    for wrong in (randn(4, 6), more["base"].double()):
        with pytest.raises(
            ValueError, match=rf"{name} needs base.*\(6, 4\) torch.float32; .* is g"
        ):
            METHODS[name](stack, base=wrong)
    if name != "nuslerp":
        with pytest.raises(ValueError, match=f"{name} needs base, .*; none is given"):
            METHODS[name](stack)
    with pytest.raises(ValueError, match=f"{name}: base follows from base_model; give that"):
        check_method(name, {"base": more["base"]})


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-8), (torch.float32, 2e-6)])
@pytest.mark.parametrize("name, options, expected", GOLDEN)
def test_numbers_stay_those_of_the_first_version(name, options, expected, dtype, tolerance):
    """A merge may be repeated by a later version: what it writes must not have moved."""
    stack = torch.tensor(EIGHTHS, dtype=dtype)[: EXPERTS.get(name, 2)] / 8
    more = {"generator": generators(1, 2)} if name in DRAWN else {}
    if name in BASED:
        more["base"] = torch.tensor(BASE, dtype=dtype) / 8
    merged = METHODS[name](stack, **options, **more)
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
    crumbs = {"density": 0.9, "gamma": 0.01, "weights": None, "normalize": False}
    pruning = {"density": 0.8, "epsilon": 0.15, "rescale": True, "generator": None}
    pruning |= {"weights": None, "normalize": False}
    contract = {
        "weight_average": {"weights": None},
        "task_arithmetic": {"weights": None, "normalize": False},
        "ties": trimming,
        "dare_task_arithmetic": dropping | {"weights": None, "normalize": False},
        "dare_ties": dropping | trimming,
        "tsv": {"null_directions": "zero"},
        "iso_c": {"null_directions": "zero", "mean_over": "all"},
        "wudi": descent,
        "optmerge": {"preset": "full", "center": None, "subspace": None, "rank_ratio": None}
        | dict.fromkeys(descent),
        "swudi": {"preset": "full", "exp_time": None, "rank_ratio": None},
        "aswudi": {},
        "iso_cts": {"common_ratio": 0.8, "size": "all", "null_directions": "zero"},
        "dc_merge": {"rank": None, "spectrum": None, "ramp": 5.0, "density": 1e-3},
        "ssam": {"rank_ratio": None, "sequential": False},
        "orthomerge": {
            "base": inspect.Parameter.empty, "residual": "task_arithmetic", "residual_scale": 0.2,
            "side": "smaller",
        },
        "breadcrumbs": crumbs,
        "breadcrumbs_ties": crumbs,
        "della": pruning | {"normalize": True},
        "della_linear": pruning,
        "sce": {"select_topk": 1.0, "rule": "paper"},
        "model_stock": {"filter_wise": False, "rule": "paper"},
        "slerp": {"base": inspect.Parameter.empty, "t": 0.5},
        "nuslerp": {
            "base": None, "weights": None, "of": "task_vectors", "flatten": True, "row_wise": False,
        },
    }  # fmt: skip
    for name, method in METHODS.items():
        options = list(inspect.signature(method).parameters.values())[1:]
        expected = contract[name] | {"then": None}
        assert {option.name: option.default for option in options} == expected
