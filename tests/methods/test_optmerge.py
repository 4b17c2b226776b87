"""OptMerge: the paper's subspace, the released settings, every option."""

from dataclasses import replace

import pytest
import reference
import torch
from cases import CASES, distance, experts

from optmerge_core.methods.interference import minimise_interference
from optmerge_core.methods.optmerge import PRESETS, optmerge, targets_and_subspaces
from optmerge_core.methods.wudi import wudi


def test_the_papers_subspace():
    """Eq. 3 as printed: the centred SVD's input subspace, another result than the released one."""
    task_vectors = CASES["tall"]
    expected, _ = reference.optmerge_full(task_vectors, paper=True)
    result = optmerge(task_vectors, subspace="centered")
    assert distance(result, expected) < 1e-9
    assert distance(optmerge(task_vectors), expected) > 1e-3


@pytest.mark.parametrize("case", ["one zero expert", "all zero"])
def test_a_zero_expert_weighs_nothing_though_its_centred_subspace_is_not_zero(case):
    task_vectors = CASES[case]
    expected, _ = reference.optmerge_full(task_vectors, paper=True)
    assert distance(optmerge(task_vectors, subspace="centered"), expected) < 1e-9


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


@pytest.mark.parametrize("subspace", ["uncentered", "centered", "whole"])
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("case", ["tall", "wide", "one zero expert"])
def test_what_the_subspace_does_not_see_needs_no_truncation(case, center, subspace):
    """Ti Liᵀ is what the loss sees of the targets; where one SVD gives both it is τi Liᵀ."""
    task_vectors = CASES[case]
    settings = replace(PRESETS["full"], center=center, subspace=subspace)
    targets, subspaces = targets_and_subspaces(task_vectors, settings)
    seen, same = targets_and_subspaces(task_vectors, settings, as_seen=True)
    assert torch.equal(same, subspaces)
    torch.testing.assert_close(seen @ same.mT, targets @ subspaces.mT, rtol=1e-9, atol=1e-15)
    assert (seen is task_vectors) == (subspace == ("centered" if center else "uncentered"))


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


def test_the_settings_are_the_published_ones():
    task_vectors = CASES["tall"]
    full = PRESETS["full"]
    parts = targets_and_subspaces(task_vectors, full)
    assert torch.equal(minimise_interference(task_vectors, *parts, full), optmerge(task_vectors))
    published = {name: (p.optimizer, p.learning_rate, p.steps) for name, p in PRESETS.items()}
    assert published == {
        "full": ("adam", 1e-5, 300), "lora": ("sgd", 1e-4, 300), "modality": ("sgd", 5e-2, 300),
    }  # fmt: skip
