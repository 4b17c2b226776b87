"""Spaces in which adapters merge: a method equals the dense one or a reference, or is refused."""

import pytest
import reference_methods
import torch
from cases import distance, generators

from optmerge_core.merging.spaces import Space, check_possible, merge_cores, merge_factors
from optmerge_core.methods import BASED, DRAWN, EXPERTS
from optmerge_core.methods.registry import METHODS

SHAPES = {"tall": (40, 30), "wide": (30, 40), "square": (32, 32)}
CROWDED = {"few outputs": (7, 40), "few inputs": (40, 7)}
"""Where the ranks, 3 + 2 + 4, are together more than the smaller side."""
CORE, SIX = Space("core"), Space("compressed", rank=6)
NEEDS_BASE = {"orthomerge", "slerp"}
LEAVES = {
    "ties", "dare_task_arithmetic", "dare_ties", "wudi", "aswudi", "breadcrumbs",
    "breadcrumbs_ties", "della", "della_linear", "sce",
}  # fmt: skip
LORA = {"preset": "lora"}
TRANSLATED = [
    ("weight_average", {"weights": [1.0, 2.0, 3.0]}),
    ("task_arithmetic", {"weights": [1.0, -0.5, 2.0], "normalize": True}),
    ("tsv", {}),
    ("iso_c", {}),
    ("iso_c", {"mean_over": "nonzero"}),
    ("iso_cts", {}),
    ("iso_cts", {"common_ratio": 0.1}),
    ("iso_cts", {"size": "nonzero", "common_ratio": 0.5}),
    ("iso_cts", {"common_ratio": 0.1, "then": "svc"}),
    ("dc_merge", {}),
    ("dc_merge", {"spectrum": "kept", "density": 0.2}),
    ("dc_merge", {"spectrum": "ramp", "ramp": 2.0}),
    ("dc_merge", {"rank": 2, "density": 0.1}),
    ("dc_merge", {"rank": 100}),
    ("ssam", {}),
    ("ssam", {"rank_ratio": 0.15}),
    ("ssam", {"rank_ratio": 0.15, "sequential": True}),
    ("model_stock", {}),
    ("model_stock", {"rule": "mergekit"}),
    ("nuslerp", {"weights": [0.2, 0.8]}),
    ("swudi", {}),
    ("swudi", {"rank_ratio": 0.1, "exp_time": 3.0}),
    ("swudi", LORA),
    ("swudi", LORA | {"rank_ratio": 0.1, "then": "svc"}),
    ("wudi", {"optimizer": "ridge"}),
    ("wudi", {"optimizer": "sgd", "learning_rate": 0.1}),
    ("optmerge", LORA | {"learning_rate": 0.1}),
    ("optmerge", LORA | {"rank_ratio": 0.1, "learning_rate": 0.1}),
    ("optmerge", {"preset": "modality"}),
]


def factors(shape, ranks=(3, 2, 4), seed=0, dtype=torch.float64):
    """(B, A) of each expert, of decreasing length."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    return [(draw(shape[0], r) / (2 + i), draw(r, shape[1])) for i, r in enumerate(ranks)]


def fitted(method, pairs):
    return pairs[: EXPERTS.get(method, len(pairs))]


def drawn(method, pairs):
    return {"generator": generators(*range(len(pairs)))} if method in DRAWN else {}


def dense(pairs, method, **options):
    return METHODS[method](torch.stack([b @ a for b, a in pairs]), **options)


def merged(pairs, method, options, shape, *space):
    b, a = merge_factors(pairs, method, options | drawn(method, pairs), 1.0, shape, *space)
    assert b.dtype == a.dtype == torch.float32 and b.shape[1] == a.shape[0]
    return b.double() @ a.double()


@pytest.mark.parametrize("shape", [*SHAPES.values(), *CROWDED.values()], ids=str)
@pytest.mark.parametrize(("method", "options"), TRANSLATED)
def test_in_factors_a_method_gives_what_it_gives_for_whole_matrices(method, options, shape):
    pairs = fitted(method, factors(shape))
    check_possible(method, options)
    expected = dense(pairs, method, **options)
    assert distance(merged(pairs, method, options, shape), expected) < 1e-5


def test_every_method_is_possible_with_factors_or_named_here():
    refused = set()
    for method in METHODS:
        try:
            check_possible(method, LORA if method == "optmerge" else {})
        except ValueError as error:
            assert str(error).startswith(f"{method} ")
            refused.add(method)
    assert refused == NEEDS_BASE | LEAVES
    assert {method for method, _ in TRANSLATED} >= METHODS.keys() - refused


@pytest.mark.parametrize("space", [CORE, SIX], ids=["core", "compressed"])
@pytest.mark.parametrize("method", [m for m in METHODS if m not in NEEDS_BASE])
def test_small_matrices_merge_by_every_method_as_in_the_reference(method, space):
    shape = (21, 16)
    pairs = fitted(method, factors(shape))
    options = {"density": 0.3} if method in ("ties", "dare_ties", "breadcrumbs") else {}
    check_possible(method, options, space)

    def merge(stack):
        return METHODS[method](stack, **options, **drawn(method, pairs))

    if space is CORE:
        expected = reference_methods.core_space(pairs, merge)
    else:
        expected = reference_methods.compressed_space(pairs, merge, 6)
    assert distance(merged(pairs, method, options, shape, space), expected) < 1e-5


@pytest.mark.parametrize("shape", [*SHAPES.values(), *CROWDED.values()], ids=str)
@pytest.mark.parametrize("rank", [None, 12])
@pytest.mark.parametrize("method", ["weight_average", "task_arithmetic", "model_stock", "nuslerp"])
def test_a_space_loses_nothing_of_what_sums(method, rank, shape):
    """Nor does compression to no less than the sum of the ranks."""
    space = CORE if rank is None else Space("compressed", rank)
    pairs = fitted(method, factors(shape))
    result = merged(pairs, method, {}, shape, space)
    assert distance(result, dense(pairs, method)) < 1e-5


def test_core_space_by_hand():
    """One direction on either side, where 2 and −4 stand: the sum is −2, so −4 remains."""
    b, a = torch.tensor([[2.0], [0.0], [0.0]]), torch.tensor([[1.0, 0.0]])
    result = merged([(b, a), (b, -2 * a)], "ties", {"density": 0.5}, (3, 2), CORE)
    expected = torch.zeros(3, 2, dtype=torch.float64)
    expected[0, 0] = -4
    torch.testing.assert_close(result, expected, atol=1e-6, rtol=0)


def test_an_even_spectrum_is_the_mean_of_the_cores_singular_values():
    """By hand 6 and 1 of a 3 × 3 matrix: 3.5, where all three would make 7 / 3 of it."""
    one, two, _ = torch.eye(3).split(1)
    pairs = [(2 * one.T, 3 * one), (two.T, two)]
    for space in (Space("core", spectrum="even"), Space("compressed", 2, "even")):
        result = merged(pairs, "task_arithmetic", {}, (3, 3), space)
        torch.testing.assert_close(result, torch.diag(torch.tensor([3.5, 3.5, 0.0]).double()))
    every = torch.diag(torch.tensor([1.0, 1.0, 0.0])).double() * 7 / 3
    torch.testing.assert_close(merged(pairs, "iso_c", {}, (3, 3)), every)


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_ties", "tsv"])
def test_an_even_spectrum_equals_the_reference(method):
    shape = (21, 16)
    pairs = factors(shape)

    def merge(stack):
        return METHODS[method](stack, **drawn(method, pairs))

    expected = reference_methods.core_space(pairs, merge, even=True)
    result = merged(pairs, method, {}, shape, Space("core", spectrum="even"))
    assert distance(result, expected) < 1e-5
    expected = reference_methods.compressed_space(pairs, merge, 5, even=True)
    result = merged(pairs, method, {}, shape, Space("compressed", 5, "even"))
    assert distance(result, expected) < 1e-5


@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_a_compressed_sum_is_ssams(shape):
    pairs = factors(shape)
    expected = dense(pairs, "ssam", rank_ratio=4.5 / min(shape))
    result = merged(pairs, "task_arithmetic", {}, shape, Space("compressed", 4))
    assert distance(result, expected) < 1e-5 and torch.linalg.matrix_rank(result, rtol=1e-5) == 4


def test_spaces_do_not_hang_on_the_order_of_experts_nor_compression_on_the_factors():
    shape = (21, 16)
    pairs = factors(shape)
    for space in (CORE, SIX):
        one = merged(pairs, "ties", {}, shape, space)
        assert distance(merged(pairs[::-1], "ties", {}, shape, space), one) < 1e-5
    turned = [(b @ (x := torch.randn(len(a), len(a)).double()), x.inverse() @ a) for b, a in pairs]
    assert distance(merged(turned, "ties", {}, shape, SIX), one) < 1e-5


@pytest.mark.parametrize("space", [Space(), CORE, SIX], ids=lambda space: space.name)
def test_who_does_not_adapt_a_layer_has_zeros_there(space):
    shape = (21, 16)
    one, two, _ = factors(shape)
    zeros = (torch.zeros(21, 1).double(), torch.zeros(1, 16).double())
    left_out = merged([one, None, two], "weight_average", {}, shape, space)
    assert distance(left_out, merged([one, zeros, two], "weight_average", {}, shape, space)) < 1e-5
    nothing = merged([zeros, zeros], "tsv", {}, shape, space)
    assert not nothing.any()


def test_the_rank_of_a_merged_layer():
    shape = (21, 5)
    for space, expected in ((Space(), 5), (CORE, 5), (Space("compressed", 4), 4)):
        b, a = merge_factors(factors(shape), "task_arithmetic", {}, 1.0, shape, space)
        assert b.shape[1] == len(a) == space.rank_of(9, shape) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("whole",), "space is 'whole'; valid are 'factors', 'core', 'compressed'"),
        (("core", None, "flat"), "spectrum is 'flat'; valid are 'kept', 'even'"),
        (("compressed",), "rank is None; space='compressed' needs that of the merged adapter"),
        (("compressed", 0), "rank is 0; .* a whole number of at least 1"),
        (("compressed", True), "rank is True"),
        (("compressed", 2.0), "rank is 2.0"),
        (("core", 4), "rank is for space='compressed'; leave it out of 'core'"),
        (("factors", None, "even"), "spectrum='even' is for the spaces 'core' and 'compressed'"),
    ],
)
def test_what_is_no_space_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Space(*arguments)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("ties", {}, "ties works on single entries.*merge with a base model, or space='core'"),
        ("model_stock", {"filter_wise": True}, "model_stock with filter_wise=True works on single"),
        ("nuslerp", {"flatten": False}, "nuslerp with flatten=False works on single rows"),
        ("iso_cts", {"null_directions": "fill"}, "iso_cts with null_directions='fill' leaves"),
    ],
)
def test_what_leaves_the_factors_span_is_possible_in_core_space_alone(method, options, message):
    check_possible(method, options, CORE)
    with pytest.raises(ValueError, match=message):
        check_possible(method, options)


@pytest.mark.parametrize("method", BASED)
@pytest.mark.parametrize("space", [Space(), CORE, SIX], ids=lambda space: space.name)
def test_what_needs_the_bases_weights_is_refused_everywhere(method, space):
    options = {"of": "weights"} if method == "nuslerp" else {}
    message = f"{method} needs the base's own matrix: its result is no adapter; use merge with a"
    with pytest.raises(ValueError, match=message):
        check_possible(method, options, space)


def test_cores_are_not_changed_by_their_merge():
    cores, options = torch.randn(3, 6, 5).double(), {"rank": 2}
    before = cores.clone()
    merge_cores(cores, "dc_merge", options, (20, 30))
    assert torch.equal(cores, before) and options == {"rank": 2}
