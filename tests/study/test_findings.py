"""What a diagnosis means: each finding on made-up experts, and on the embedded ones."""

from itertools import combinations
from pathlib import Path

import pandas as pd
import pytest
import torch
from cases import NAMES, moved, random

from optmerge_core import load_recipe, open_checkpoint, open_expert
from optmerge_core.merging.families import mergeable
from optmerge_core.study import diagnosis as module
from optmerge_core.study import findings
from optmerge_core.study.diagnosis import diagnose

DATA = Path(__file__).resolve().parents[2] / "data"


def told(diagnosed: module.Diagnosis, word: str) -> list[findings.Finding]:
    return [finding for finding in diagnosed.findings if word in str(finding)]


def serious(diagnosed: module.Diagnosis) -> list[str]:
    return [str(finding) for finding in diagnosed.findings if finding.severity != "note"]


def study(name: str):
    recipe = load_recipe(DATA / f"recipes/{name}.yaml")
    base = open_checkpoint(recipe.base_model)
    experts = {name: open_expert(folder, base) for name, folder in recipe.experts.items()}
    names = mergeable(base.shapes(), base.config()["model_type"])
    return diagnose(base, experts, names, options=recipe.options("optmerge"))


def test_what_rounding_lost_is_told(base):
    stored = moved(base, dtype=torch.bfloat16)
    wide = {name: tensor.float() for name, tensor in stored.items()}
    small = moved(wide, random(1, 0.001), dtype=torch.bfloat16)
    found = diagnose(stored, {"a": small}, NAMES)
    assert found.experts.loc["a", "rounding"] > 0.4 and found.experts.loc["a", "unchanged"] > 0.5
    assert found.findings[0].severity == "problem" and told(found, "Get the checkpoint in float32")
    enough = moved(wide, random(1, 0.05), dtype=torch.bfloat16)
    assert not told(diagnose(stored, {"a": enough}, NAMES), "float32")


def test_full_rank_asks_for_the_preset_full(base, experts):
    assert told(diagnose(base, experts, NAMES, options={"preset": "lora"}), "Write preset: full")


def test_gentle_experts_give_no_warning(base, experts):
    assert serious(diagnose(base, experts, NAMES)) == []


def test_an_expert_equal_to_the_base(base, experts):
    found = diagnose(base, experts | {"b": dict(base)}, NAMES)
    assert [finding.experts for finding in told(found, "vector is zero")] == [("b",)]
    assert found.experts.loc["b", "changed"] == 0


def test_a_zero_task_vector_says_nothing_of_the_others(base, experts):
    same = {n: t.clone() for n, t in base.items()}
    name = next(iter(experts))
    found = diagnose(base, {name: experts[name], "same": same}, NAMES)
    assert not told(found, "times as long") and not told(found, "share")


def test_an_expert_of_another_base(base, experts):
    other = random(9)
    found = diagnose(base, experts | {"b": moved(other, random(2, 0.05))}, NAMES)
    (finding,) = told(found, "another base")
    assert finding.severity == "problem" and finding.experts == ("b",)


def test_adapters_norms_and_cosines_say_nothing_of_their_base():
    """Another base is what a whole model far away tells of; an adapter's update is large."""
    far = made_up(stored="adapter", cosine_with_base=0.9, relative_norm=0.88)
    alike = made_up(of_pairs={"cosine": [0.9, 0.9, 0.9]}, stored="adapter")
    related = made_up(
        of_pairs={"cosine": [0.9, 0.0, 0.0]}, stored=["adapter", "adapter", "bfloat16"]
    )
    for found, word in (
        (far, "warning: a: its update is 88% as long as the base's weights."),
        (alike, "problem: a, b, c: all task vectors point the same way"),
        (related, "warning: a, b: their task vectors share a change"),
    ):
        said = "\n".join(f"{finding.severity}: {finding}" for finding in findings.find(found))
        assert word in said and "another base" not in said and "base_model" not in said
        assert "another model" not in said
    mixed = texts(stored=["adapter", "bfloat16", "bfloat16"], of_pairs={"cosine": [0.9, 0.0, 0.0]})
    assert "another model than the base" in mixed


def test_all_experts_of_another_base(base):
    """Trained on from the base by three times what each expert adds: each alone looks fine."""
    on = moved(base, random(9, 0.15))
    experts = {name: moved(on, random(i, 0.05)) for i, name in enumerate("abc", 1)}
    found = diagnose(base, experts, NAMES)
    assert not told(found, "cosine 0.9 with")
    (finding,) = told(found, "point the same way")
    assert finding.experts == ("a", "b", "c")
    assert not told(diagnose(on, experts, NAMES), "point the same way")


def test_duplicates_relatives_and_opposites(base, experts):
    tau = random(1, 0.05)
    twice = experts | {"b": moved(base, tau, random(7, 0.001))}
    assert told(diagnose(base, twice, NAMES), "nearly the same")[0].experts == ("a", "b")
    related = experts | {"b": moved(base, tau, random(7, 0.05))}
    assert told(diagnose(base, related, NAMES), "share a change")[0].experts == ("a", "b")
    against = experts | {"b": {n: 2 * base[n] - experts["a"][n] for n in NAMES}}
    assert told(diagnose(base, against, NAMES), "against each other")[0].experts == ("a", "b")


def test_a_long_task_vector_is_strong_and_dominates(base, experts):
    found = diagnose(base, experts | {"b": moved(base, random(2, 0.18))}, NAMES)
    assert [finding.experts for finding in told(found, "times as long")] == [("b",)]
    assert [finding.experts for finding in told(found, "Landmarks")] == [("b",)]
    two = {"a": experts["a"], "b": moved(base, random(2, 0.18))}
    assert told(diagnose(base, two, NAMES), "3.6 times as long")


@pytest.mark.parametrize("method, severity", [("task_arithmetic", "warning"), ("optmerge", "note")])
def test_a_crowded_sum(base, method, severity):
    experts = {str(i): moved(base, random(i, 0.09)) for i in range(1, 6)}
    found = diagnose(base, experts, NAMES, method=method)
    (finding,) = told(found, "the other experts add")
    assert finding.severity == severity and "λ around 0.4" in finding.remedy
    assert found.experts["others"].to_numpy() == pytest.approx(0.18, rel=0.05)
    half = diagnose(base, experts, NAMES, method="task_arithmetic", scaling_coefficient=0.5)
    assert not told(half, "the other experts add")


def test_landmarks_are_those_of_the_embedded_experts():
    gentle, stressed = study("internvl"), study("internvl_stressed")
    for found, landmark in ((gentle, findings.GENTLE), (stressed, findings.STRONG)):
        norms = found.experts["relative_norm"]
        assert (norms.min(), norms.max()) == pytest.approx(landmark, abs=5e-4)
        rank = found.experts["entropy_rank"] / found.experts["full_rank"]
        assert (rank < findings.OTHER_BASE_RANK).all()
    assert serious(gentle) == []
    assert len(serious(stressed)) == 1 and told(stressed, "moved by 11.0% to 17.3%")


def test_an_embedded_expert_of_another_base_is_found():
    """Qwen2-VL's language model was trained on from InternVL's."""
    ours, theirs = (open_checkpoint(DATA / f"benchmark/{n}/base") for n in ("internvl", "qwen2_vl"))
    front = "language_model."
    names = mergeable(ours.shapes(), "internvl")
    other = {name: theirs[name.removeprefix(front)] for name in names}
    expert = open_checkpoint(DATA / "benchmark/internvl/gentle/OCR")
    found = diagnose(ours, {"OCR": expert, "other": other}, names)
    (finding,) = told(found, "another base")
    assert finding.experts == ("other",) and "spread over" in finding.found


def made_up(of_pairs=None, **of_experts) -> findings.Diagnosis:
    """Three fully fine-tuned experts that no rule has anything to say about, but for what is given.

    of_experts and of_pairs: columns with one value for all, or a list.
    """
    names = ["a", "b", "c"]
    quiet = {
        "norm": 1.0, "relative_norm": 0.05, "cosine_with_base": 0.99, "unchanged": 0.0,
        "rounding": 0.0, "changed": 1.0, "full_rank": 1000.0, "rank": 1000.0,
        "entropy_rank": 200.0, "others": 0.05, "stored": "bfloat16",
    }  # fmt: skip
    index = pd.MultiIndex.from_tuples(list(combinations(names, 2)), names=["first", "second"])
    apart = {"cosine": 0.0, "sign_conflict": 0.5, "shared_subspace": 0.3, "chance": 0.3}
    dropped = pd.DataFrame(columns=["expert", "module", "parameters", "changed", "relative_norm"])
    return findings.Diagnosis(
        parameters=pd.DataFrame(),
        layers=pd.DataFrame(index=[0]),
        experts=pd.DataFrame(quiet | of_experts, index=names),
        pairs=pd.DataFrame(apart | (of_pairs or {}), index=index),
        dropped=dropped,
        sampled_layers=[0],
    )


def texts(*, method="optmerge", options=None, **measured) -> str:
    found = findings.find(made_up(**measured), method, options)
    return "\n".join(f"{finding.severity}: {finding}" for finding in found)


def one_pair(cosine) -> dict:
    return {"of_pairs": {"cosine": [cosine, 0.0, 0.0]}}


@pytest.mark.parametrize(
    ("quiet", "telling", "word"),
    [
        ({"cosine_with_base": 0.951}, {"cosine_with_base": 0.949}, "from another base"),
        ({"relative_norm": 0.099}, {"relative_norm": 0.101}, "warning: a, b, c: moved by 10.1%"),
        (
            {"cosine_with_base": 0.9, "entropy_rank": 299.0},
            {"cosine_with_base": 0.9, "entropy_rank": 301.0},
            "spread over 30% of the directions",
        ),
        (one_pair(0.499), one_pair(0.501), "share a change"),
        (one_pair(0.989), one_pair(0.991), "nearly the same"),
        (one_pair(-0.199), one_pair(-0.201), "point against each other"),
        (
            {"of_pairs": {"cosine": [0.501, 0.501, 0.499]}},
            {"of_pairs": {"cosine": [0.501, 0.501, 0.501]}},
            "problem: a, b, c: all task vectors point the same way",
        ),
        ({"norm": [1.0, 2.99, 1.0]}, {"norm": [1.0, 3.01, 1.0]}, "warning: b: its task vector is"),
        ({"others": 0.149}, {"others": 0.151}, "half of the sums with more than 15%"),
        (
            {"others": 0.079, "rank": 50.0},
            {"others": 0.081, "rank": 50.0},
            "'s LoRA experts half of the sums with more than 8%",
        ),
        ({"rank": 251.0}, {"rank": 249.0}, "Write preset: lora into"),
        (
            {"of_pairs": {"shared_subspace": 0.399}},
            {"of_pairs": {"shared_subspace": 0.401}},
            "They read the same features",
        ),
        (
            {"of_pairs": {"shared_subspace": 0.401}},
            {"of_pairs": {"shared_subspace": 0.399}},
            "Their rows tell little",
        ),
        ({"rounding": 0.099}, {"rounding": 0.101}, "warning: a: 10% of its task vector's energy"),
        ({"rounding": 0.399}, {"rounding": 0.401}, "problem: a: about half or more"),
        (
            {"rounding": 0.2, "unchanged": 0.499},
            {"rounding": 0.2, "unchanged": 0.501},
            "50% of the entries equal the base's",
        ),
    ],
)
def test_each_threshold_has_two_sides(quiet, telling, word):
    """Numbers are typed here, not the constants: a threshold that moves is a change to notice."""
    assert word not in texts(**quiet)
    assert word in texts(**telling)


def test_full_rank_is_low_rank_for_the_preset_lora_alone():
    for rank, told_full in ((251.0, True), (249.0, False)):
        found = texts(rank=rank, options={"preset": "lora"})
        assert ("Write preset: full into" in found) == told_full
    assert "preset" not in texts(rank=float("nan"))


@pytest.mark.parametrize(("rank", "scaling"), [(1000.0, "0.5"), (50.0, "0.2")])
def test_the_scaling_to_try_brings_a_sum_to_its_aim(rank, scaling):
    """0.08 of 0.16 for full fine-tuning, 0.04 (0.25 of it, rounded to one digit) for LoRA."""
    assert f"search λ around {scaling} on" in texts(rank=rank, others=0.16)


def test_experts_that_are_far_from_the_base_are_of_another_and_not_strong():
    found = texts(cosine_with_base=[0.949, 0.951, 0.951], relative_norm=[0.2, 0.2, 0.05])
    assert "problem: a: its weights" in found and "warning: b: moved by 20.0%" in found
