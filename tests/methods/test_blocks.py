"""Merging block by block against merging whole, and thresholds against sorting."""

import numpy as np
import pytest
import torch
from cases import generators

from optmerge_core import METHODS, merge
from optmerge_core.methods.blocks import Blocks, kth_smallest
from optmerge_core.methods.registry import merge_blocks, merges_in_blocks


def stacks():
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(4, 60, 70, generator=generator)
    frozen = numbers.clone()
    frozen[:, 10:] = 0
    frozen[1] = 0
    spike = torch.zeros(2, 4200)
    spike[:, 1::2] = 1.0
    yield from {
        "numbers": numbers,
        "few values, as of half precision": (4 * numbers).round() / 4,
        "frozen rows and a frozen expert": frozen,
        "two values": spike,
        "sorted": numbers.flatten(1).abs().sort(1).values,
        "one entry": numbers[:, :1, 0],
        "float64": numbers.double(),
    }.items()


STACKS = dict(stacks())


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("sample", [8, 100, 1 << 16])
def test_the_kth_smallest_is_that_of_sorting(name, sample, monkeypatch):
    monkeypatch.setattr("optmerge_core.methods.blocks.SAMPLE", sample)
    stack = STACKS[name]
    ordered = np.sort(stack.flatten(1).abs().numpy(), axis=1)
    size = ordered.shape[1]
    for k in {1, 2, size // 5, size // 2, int(0.8 * size), size - 1, size} & {*range(1, size + 1)}:
        found, smaller, equal = kth_smallest(Blocks.of(stack, 512), [k] * len(stack))
        np.testing.assert_array_equal(found.numpy(), ordered[:, k - 1])
        assert found.dtype == stack.dtype
        assert smaller == (ordered < ordered[:, k - 1 : k]).sum(1).tolist()
        assert equal == (ordered == ordered[:, k - 1 : k]).sum(1).tolist()


def test_a_sample_that_misleads(monkeypatch):
    """Every entry that is drawn is large, all others are small."""
    monkeypatch.setattr("optmerge_core.methods.blocks.SAMPLE", 100)
    numbers = torch.rand(1, 10_000)
    numbers[:, :: 10_000 // 100 | 1] += 1
    ordered = numbers.sort(dim=1).values
    for k in (100, 5000, 9900):
        assert kth_smallest(Blocks.of(numbers, 300), [k]).values == ordered[0, k - 1]


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize(
    "method, options",
    [
        ("weight_average", {}),
        ("weight_average", {"weights": True}),
        ("task_arithmetic", {}),
        ("ties", {"density": 0.3}),
        ("ties", {"density": 0.3, "weights": True}),
        ("ties", {"density": 1.0, "normalize": False}),
        ("dare_task_arithmetic", {"drop_rate": 0.4}),
        ("dare_ties", {"drop_rate": 0.4, "density": 1.0, "rule": "mergekit", "weights": True}),
        ("ties", {"density": 0.3, "rule": "mergekit"}),
        ("ties", {"density": 0.6, "rule": "mergekit", "weights": True}),
    ],
)
def test_blocks_of_any_size_give_the_same_bits(name, method, options):
    stack = STACKS[name]
    if "weights" in options:
        options = options | {"weights": [0.5 + i for i in range(len(stack))]}

    def chosen():
        """With DARE's generators as in a merge, one an expert, in their first state."""
        draws = method.startswith("dare_")
        return options | ({"generator": generators(*range(len(stack)))} if draws else {})

    whole, squares = METHODS[method](stack, **chosen()), torch.zeros(len(stack))
    for size in (1, 37, 512, 1 << 20) if stack[0].numel() < 100 else (37, 512, 1 << 20):
        merged = torch.full((stack[0].numel(),), torch.nan, dtype=stack.dtype)
        squares.zero_()
        for entries, block, result in merge_blocks(method, Blocks.of(stack, size), **chosen()):
            merged[entries] = result
            if block is not None:
                squares += block.square().sum(1)
        assert torch.equal(merged.view(stack.shape[1:]), whole)
        torch.testing.assert_close(squares, stack.flatten(1).square().sum(1).float())


def test_an_expert_without_a_threshold_is_an_error_and_not_left_out():
    with pytest.raises(ValueError, match="shorter"):
        list(merge_blocks("ties", Blocks.of(STACKS["numbers"]), thresholds=torch.zeros(3)))


def test_only_what_is_entrywise_merges_in_blocks():
    assert {m for m in METHODS if merges_in_blocks(m, {})} == {
        "weight_average", "task_arithmetic", "dare_task_arithmetic", "ties"
    }  # fmt: skip
    assert merges_in_blocks("dare_ties", {"density": 1.0, "rule": "mergekit"})
    assert not merges_in_blocks("dare_ties", {"density": 0.9, "rule": "mergekit"})
    assert not merges_in_blocks("dare_ties", {"density": 1.0})


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("weight_average", {}),
        ("task_arithmetic", {}),
        ("ties", {}),
        ("ties", {"rule": "mergekit"}),
        ("dare_task_arithmetic", {}),
        ("dare_ties", {"density": 1.0, "rule": "mergekit"}),
    ],
)
def test_small_blocks_write_the_same_bytes(tiny, tmp_path, monkeypatch, method, options):
    chosen = {"method": method, "method_options": options, "scaling_coefficient": 0.7}
    merge(tiny.base, tiny.experts, tmp_path / "large", **chosen)
    monkeypatch.setattr(Blocks.__init__, "__defaults__", (50,))
    merge(tiny.base, tiny.experts, tmp_path / "small", **chosen)
    files = sorted(path.name for path in (tmp_path / "large").glob("*.safetensors"))
    assert files
    for file in files:
        assert (tmp_path / "large" / file).read_bytes() == (tmp_path / "small" / file).read_bytes()
