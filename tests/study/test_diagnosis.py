"""What is measured of experts before a merge."""

import numpy as np
import pandas as pd
import pytest
import torch
from cases import NAMES, moved, random

from optmerge_core import open_checkpoint, open_expert
from optmerge_core.checkpoints.weights import InMemory
from optmerge_core.merging.families import mergeable
from optmerge_core.merging.loop import merge_tensors
from optmerge_core.methods.svd import singular_values
from optmerge_core.study import diagnosis as module
from optmerge_core.study import findings
from optmerge_core.study.diagnosis import diagnose, module_of
from optmerge_core.task_vectors import spectra
from optmerge_core.task_vectors.stack import TaskVectors
from optmerge_core.task_vectors.tables import layer_norms


def told(diagnosed: module.Diagnosis, word: str) -> list[findings.Finding]:
    return [finding for finding in diagnosed.findings if word in str(finding)]


def test_a_case_by_hand():
    name = "model.layers.4.mlp.up_proj.weight"
    base = {name: torch.tensor([[3.0, 4.0, 0.0]]), "model.norm.weight": torch.ones(2)}
    a = {name: torch.tensor([[3.0, 4.0, 1.0]]), "model.norm.weight": torch.ones(2)}
    b = {name: torch.tensor([[5.0, 4.0, -1.0]]), "model.norm.weight": torch.tensor([1.0, 2.0])}
    found = diagnose(base, {"a": a, "b": b}, [name])
    row = found.experts.loc["b"]
    assert row["norm"] == pytest.approx(5**0.5) and row["relative_norm"] == pytest.approx(0.2**0.5)
    assert row["cosine_with_base"] == pytest.approx((15 + 16) / (5 * 42**0.5))
    assert row["unchanged"] == pytest.approx(1 / 3) and row["others"] == pytest.approx(1 / 5)
    assert row["stored"] == "float32" and row["changed"] == 1
    pair = found.pairs.loc[("a", "b")]
    assert pair["cosine"] == pytest.approx(-1 / 5**0.5) and pair["sign_conflict"] == 1
    assert found.layers.loc[4, "a"] == pytest.approx(1 / 5)
    assert found.dropped.iloc[0].tolist() == ["b", "norms", 1, 1, pytest.approx(0.5**0.5)]
    assert len(found.dropped) == 1


def test_how_often_a_sum_counts_directions_by_hand():
    """diag(1, 1) and diag(3, 0): along e1 s is 4 and 4/3, along e2 the first has 1 for its 1."""
    name, other = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
    base = {n: torch.zeros(2, 2) for n in (name, other)}
    a = {name: torch.eye(2), other: torch.diag(torch.tensor([0.0, 3.0]))}
    b = {name: torch.diag(torch.tensor([3.0, 0.0])), other: torch.diag(torch.tensor([4.0, 0.0]))}
    found = diagnose(base, {"a": a, "b": b}, [name, other])
    assert found.parameters["counted"].tolist() == pytest.approx([5 / 2, 12 / 9, 1, 1])
    assert found.experts["counted"].tolist() == pytest.approx([(5 + 9) / (2 + 9), (12 + 16) / 25])
    opposed = {n: -x for n, x in a.items()}
    found = diagnose(base, {"a": a, "b": {n: 0.5 * x for n, x in opposed.items()}}, [name, other])
    assert found.experts["counted"].tolist() == [1, 1]  # what cancels is not counted more


@pytest.mark.parametrize("owner", ["the base", "expert a"])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_what_is_not_finite_is_named(owner, value):
    """By the measures, and by the merge in memory that sweeps and notebooks take."""
    base, name = random(0), NAMES[-1]
    experts = {x: moved(base, random(i, 0.05)) for i, x in enumerate("ab", 1)}
    (base if owner == "the base" else experts["a"])[name][-1, -1] = float(value)
    for measure in (diagnose, merge_tensors):
        with pytest.raises(ValueError, match=f"^{name}: {owner} has 1 NaN or Inf; use an earlier"):
            measure(base, experts, NAMES, method="optmerge")


def test_agrees_with_the_functions_for_whole_stacks(base, experts, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 100)
    found = diagnose(base, experts, NAMES)
    task_vectors = TaskVectors(base, experts, NAMES)
    whole = torch.cat([task_vectors[name] for name in NAMES], 1)
    pairs = found.pairs
    first, second = np.triu_indices(3, 1)
    cosines = spectra.cosine_matrix(whole)[first, second]
    assert pairs["cosine"].to_numpy() == pytest.approx(cosines.numpy(), abs=1e-6)
    conflicts = spectra.sign_conflict_matrix(whole)[first, second]
    assert pairs["sign_conflict"].to_numpy() == pytest.approx(conflicts.numpy(), abs=1e-6)
    shared = [spectra.subspace_overlap(task_vectors[name], 10)[first, second] for name in NAMES]
    assert pairs["shared_subspace"].to_numpy() == pytest.approx(
        torch.stack(shared).mean(0).numpy(), abs=1e-5
    )
    assert pairs["chance"].tolist() == pytest.approx([10 / 32] * 3)
    norms = layer_norms(task_vectors)
    for column in ("parameter", "layer", "kind", "expert", "size"):
        assert found.parameters[column].tolist() == norms[column].tolist()
    assert found.parameters["relative_norm"].to_numpy() == pytest.approx(
        norms["relative_norm"].to_numpy(), rel=1e-5
    )
    values = singular_values(task_vectors[NAMES[0]])
    ranks = found.parameters.iloc[:3]
    assert ranks["entropy_rank"].to_numpy() == pytest.approx(spectra.entropy_rank(values).numpy())
    assert ranks["rank"].tolist() == [32] * 3


def test_reads_checkpoints_and_one_expert_has_no_pairs(tiny):
    base = open_checkpoint(tiny.base)
    names = mergeable(base.shapes(), "internvl")
    found = diagnose(base, {"ocr": open_expert(tiny.experts["ocr"], base)}, names)
    assert found.pairs.empty and found.dropped.empty and found.sampled_layers == [0, 1]
    assert (
        found.experts.loc["ocr", "stored"] == "float16" and found.experts.loc["ocr", "others"] == 0
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 0.5, 0.25])
def test_rounding_noise_is_estimated(base, dtype, scale):
    """Against the noise itself: the experts before and after rounding are both known."""
    scale *= 0.04 if dtype == torch.bfloat16 else 0.005
    stored, exact = moved(base, dtype=dtype), random(1, scale)
    expert = moved({name: stored[name].float() for name in NAMES}, exact, dtype=dtype)
    noise = signal = zeros = 0
    for name in NAMES:
        measured = expert[name].double() - stored[name].double()
        noise += (measured - exact[name].double()).square().sum()
        signal += measured.square().sum()
        zeros += (measured == 0).double().mean() / len(NAMES)
    found = diagnose(stored, {"a": expert}, NAMES).experts.loc["a"]
    assert found["rounding"] == pytest.approx(float(noise / signal), rel=0.15)
    assert found["unchanged"] == pytest.approx(float(zeros))


@pytest.mark.parametrize("shape", [(256, 256), (300, 400)])
def test_rounding_of_large_matrices_is_estimated_from_a_sample(shape):
    """The second has more entries than a sample; rows grow, so that the first ones tell little."""
    generator = torch.Generator().manual_seed(0)
    size = torch.logspace(-1, 1, shape[0]).unsqueeze(1)
    stored = {NAMES[0]: (size * torch.randn(shape, generator=generator)).bfloat16()}
    exact = 0.04 * size * torch.randn(shape, generator=generator)
    expert = {NAMES[0]: (stored[NAMES[0]].float() + exact).bfloat16()}
    measured = expert[NAMES[0]].double() - stored[NAMES[0]].double()
    share = (measured - exact).square().sum() / measured.square().sum()
    found = [diagnose(stored, {"a": expert}, NAMES[:1]).experts.loc["a"] for _ in range(2)]
    assert found[0]["rounding"] == pytest.approx(share.item(), rel=0.1)
    assert found[0]["rounding"] == found[1]["rounding"], "the sample is drawn by the name"


def test_the_memory_of_a_measurement_bounds_how_many_run(base, experts, monkeypatch):
    """Bytes of a parameter: four for each expert's entry, forty for the rest."""
    asked = {}

    def recorded(work, items, *, memory=None):
        asked.update({item: memory(item) for item in items} if memory else {})
        return map(work, items)

    monkeypatch.setattr(module, "in_order", recorded)
    diagnose(base, experts, NAMES)
    assert asked == dict.fromkeys(NAMES, (4 * 3 + 40) * 48 * 32)


def test_rounding_is_the_experts_and_not_the_bases():
    """In bfloat16 numbers between 1 and 2 lie 2^-7 apart, and 0 is exact."""
    stored = {NAMES[0]: torch.zeros(8, 8, dtype=torch.bfloat16)}
    found = diagnose(stored, {"a": {NAMES[0]: stored[NAMES[0]] + 1.5}}, NAMES[:1])
    assert found.experts.loc["a", "rounding"] == pytest.approx(2**-14 / 12 / 2.25)
    assert pd.isna(found.experts.loc["a", "relative_norm"]) and not told(found, "nan")


class Adapter(InMemory):
    """Of `adapters.Adapter`, what matters here: exact products, and which parameters it adapts."""

    def __init__(self, base, factors):
        super().__init__(base | {n: base[n].float() + b @ a for n, (b, a) in factors.items()})
        self.factors, self.changes = factors, factors

    def __getitem__(self, name):
        assert name in self.changes, "all else is the base's, and need not be read"
        return super().__getitem__(name)

    def task_vector(self, name, base_tensor=None):
        b, a = self.factors[name]
        return b @ a


def test_low_rank_is_seen_even_after_rounding(base):
    stored = moved(base, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    factors = {
        name: (
            0.3 * torch.randn(48, 4, generator=generator),
            0.1 * torch.randn(4, 32, generator=generator),
        )
        for name in NAMES
    }
    adapter = Adapter(stored, factors)
    unloaded = {name: tensor.bfloat16() for name, tensor in adapter.items()}
    adapter.tensors["model.norm.weight"] = stored["model.norm.weight"] = torch.ones(2)
    found = diagnose(stored, {"adapter": adapter, "unloaded": unloaded}, NAMES)
    assert found.experts["rank"].tolist() == [4, 4]
    assert found.experts["stored"].tolist() == ["adapter", "bfloat16"]
    assert pd.isna(found.experts.loc["adapter", ["rounding", "unchanged"]]).all()
    assert told(found, "Write preset: lora")
    assert not told(diagnose(stored, {"a": adapter}, NAMES, options={"preset": "lora"}), "preset: ")
    assert not told(diagnose(stored, {"a": adapter}, NAMES, method="ties"), "preset: ")


def test_what_the_merge_drops(base, experts):
    rest = {
        "model.embed_tokens.weight": torch.ones(4, 2), "model.norm.weight": torch.ones(2),
        "visual.blocks.0.norm1.weight": torch.ones(3),
        "visual.blocks.0.norm2.weight": torch.ones(3),
        "model.layers.0.self_attn.q_proj.bias": torch.zeros(3), "ids": torch.arange(3),
    }  # fmt: skip
    changed = {
        "model.embed_tokens.weight": torch.ones(5, 2),
        "visual.blocks.0.norm1.weight": torch.tensor([1.0, 2.0, 1.0]),
        "lm_head.weight": torch.ones(4, 2),
        "ids": torch.arange(3) + 1,
    }
    full = {name: expert | rest for name, expert in experts.items()}
    full["b"] |= changed
    del full["c"]["model.norm.weight"]  # not stored: not changed
    found = diagnose(base | rest, full, NAMES)
    assert set(found.dropped["expert"]) == {"b"}
    table = found.dropped.set_index("module")
    assert set(table.index) == {"embed_tokens", "visual", "lm_head", "ids"}
    assert table.loc["visual", ["parameters", "changed"]].tolist() == [2, 1]
    assert table.loc["visual", "relative_norm"] == pytest.approx(6**-0.5)
    assert table["relative_norm"].isna().sum() == 2  # other shape, not in the base
    (finding,) = told(found, "outside the merge")
    assert finding.experts == ("b",) and "visual (40.8%)" in finding.found


@pytest.mark.parametrize(
    "name, owner",
    [
        ("model.visual.blocks.0.norm1.weight", "visual"),
        ("vision_tower.encoder.layers.0.mlp.fc1.bias", "vision_tower"),
        ("vit.blocks.0.norm1.weight", "vit"),
        ("language_model.model.embed_tokens.weight", "embed_tokens"),
        ("lm_head.weight", "lm_head"),
        ("model.layers.0.input_layernorm.weight", "norms"),
        ("model.layers.0.self_attn.q_proj.bias", "biases"),
    ],
)
def test_modules_outside_the_merge(name, owner):
    assert module_of(name) == owner


def test_costly_spectra_are_sampled(base, experts):
    found = diagnose(base, experts, NAMES, budget=1)
    assert found.sampled_layers == [1]
    assert found.parameters["rank"].notna().groupby(found.parameters["layer"]).mean().tolist() == [
        0, 1, 0,
    ]  # fmt: skip
    assert found.layers.index.tolist() == [0, 1, 2] and found.layers.notna().all(axis=None)
    assert told(found, "of 1 of 3 layers (1)")
    assert not told(diagnose(base, experts, NAMES), "of 3 layers")
