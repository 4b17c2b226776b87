"""Task vectors parameter by parameter, lazily, and what is added back."""

import pytest
import torch
from cases import NAME
from hypothesis import given, settings
from hypothesis import strategies as st

from optmerge_core.checkpoints.open import open_checkpoint
from optmerge_core.merging.loop import model_thresholds
from optmerge_core.methods.blocks import Blocks
from optmerge_core.methods.ties import trim
from optmerge_core.task_vectors.stack import TaskVectors, apply, derive_seed


def test_stack_is_expert_minus_base_in_float32(toy):
    assert toy[NAME].tolist() == [[[0.0, 1.0]], [[3.0, -4.0]]]
    assert toy[NAME].dtype == torch.float32
    assert toy.expert_names == ["a", "b"]
    assert list(toy) == [NAME] and len(toy) == 1 and "x" not in toy


def test_difference_of_halves_is_not_rounded_to_half():
    base, expert = torch.tensor([1.0]).half(), torch.tensor([0.0001]).half()
    stack = TaskVectors({"w": base}, {"a": {"w": expert}}, ["w"])["w"]
    assert torch.equal(stack[0], expert.float() - base.float())
    assert not torch.equal(stack[0], (expert - base).float())


def test_reads_checkpoints_lazily(tiny):
    experts = {name: open_checkpoint(folder) for name, folder in tiny.experts.items()}
    base = open_checkpoint(tiny.base)
    name = "language_model.model.layers.0.mlp.up_proj.weight"
    stack = TaskVectors(base, experts, [name])[name]
    assert stack.shape == (3, 48, 32)
    assert torch.equal(stack[1], experts["ocr"][name].float() - base[name].float())


def test_task_vectors_in_blocks_are_the_stack():
    base = {"w": torch.randn(30, 40).bfloat16()}
    experts = {n: {"w": (base["w"] + torch.randn(30, 40)).bfloat16()} for n in "abc"}
    task_vectors = TaskVectors(base, experts, ["w"])
    pieces = task_vectors.blocks("w", base["w"])
    assert torch.equal(pieces.read(slice(0, None)), task_vectors["w"].flatten(1))
    assert torch.equal(pieces.read(slice(0, None, 7)), task_vectors["w"].flatten(1)[:, ::7])
    found, expected = (trim(x, 0.2)[0] for x in (pieces, Blocks.of(task_vectors["w"])))
    assert torch.equal(found, expected)


def test_errors_name_parameter_expert_and_shapes(toy):
    with pytest.raises(ValueError, match="no experts"):
        TaskVectors(toy.base, {}, [NAME])
    toy.experts["b"].tensors[NAME] = torch.zeros(2, 1)
    with pytest.raises(ValueError, match=rf"{NAME}: expert b has shape \(2, 1\).*\(1, 2\)"):
        toy[NAME]
    del toy.experts["b"].tensors[NAME]
    with pytest.raises(ValueError, match="expert b does not have it"):
        toy[NAME]


def test_apply_works_in_float32_and_keeps_the_dtype():
    base, merged = torch.tensor([1.0]).half(), torch.tensor([0.0007])
    assert apply(base, merged, 1.5).dtype == torch.float16
    assert torch.equal(apply(base, merged, 1.5), (base.float() + 1.5 * merged).half())
    assert apply(base, merged, 1.5, torch.bfloat16).dtype == torch.bfloat16
    tiny = torch.tensor([1e-12]).double()
    assert apply(base, tiny, 1.0, torch.float64).item() == 1 + 1e-12  # not rounded on the way


def test_derived_seeds_differ():
    assert len({derive_seed(0, "a", "b"), derive_seed(1, "a", "b"), derive_seed(0, "ab", "")}) == 3
    assert 0 <= derive_seed(0, "a") < 2**63


def test_seeds_stay_those_of_the_first_version():
    """SHA-256 of "7\\0NAME\\0ocr" begins with 4b8fa093f57b62dd; the last byte weighs most."""
    name = "model.layers.0.mlp.up_proj.weight"
    assert derive_seed(7, name, "ocr") == 0xDD627BF593A08F4B >> 1 == 7976224562386847653
    assert derive_seed(7, name, "chart") == 3121556056299867664
    assert derive_seed(0) == 2033344993903900207
    assert derive_seed(0, "a") == 4174393671465045295


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=40),
    st.floats(0.01, 1),
    st.integers(1, 3),
)
def test_model_thresholds_equal_sorting_the_whole_model(values, density, parts):
    whole = torch.tensor([values, [0.5 * value for value in reversed(values)]])
    stacks = [part for part in whole.tensor_split(parts + 1, dim=1) if part.numel()]
    k = int((1 - density) * len(values))
    expected = whole.abs().sort(dim=1).values[:, k - 1] if k else torch.zeros(2)
    found = model_thresholds(lambda number: stacks[number::2], range(2), density)
    assert torch.equal(found, expected)
