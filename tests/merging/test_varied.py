"""Options by layer and by name: by hand, in a merge, its parts and memory; what is refused."""

import json

import pytest
import torch

from optmerge_core import join, load_plan, merge, merge_adapters, merge_part, plan_merge
from optmerge_core.checkpoints.open import open_checkpoint
from optmerge_core.merging.checks import check_method
from optmerge_core.merging.loop import merge_tensors
from optmerge_core.merging.report import MergeReport
from optmerge_core.merging.varied import Settings, is_varied, stacks
from optmerge_core.methods.registry import METHODS

NAMES = [
    *("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"),
    *(f"model.layers.{number}.mlp.up_proj.weight" for number in range(5)),
    *(f"model.layers.{number}.self_attn.q_proj.weight" for number in range(5)),
    *(f"visual.blocks.{number}.attn.qkv.weight" for number in range(2)),
    "audio.layers.0.fc.weight",
]
GRADIENT = [{"value": [0, 1, 4]}]


def test_a_gradient_runs_over_each_stack_of_layers():
    """By mergekit's rules: the first entry outside of stacks, the last where there is one layer."""
    assert stacks(NAMES) == {"model.layers": 5, "visual.blocks": 2, "audio.layers": 1}
    settings = Settings({"t": GRADIENT}, NAMES)
    found = {name: settings.of(name)[0]["t"] for name in NAMES}
    ups = [found[f"model.layers.{number}.mlp.up_proj.weight"] for number in range(5)]
    assert ups == [0, 0.5, 1, 2.5, 4]
    assert [found[f"visual.blocks.{number}.attn.qkv.weight"] for number in range(2)] == [0, 4]
    assert found["audio.layers.0.fc.weight"] == 4
    assert {found[name] for name in NAMES[:3]} == {0}


def test_a_number_at_the_start_of_a_name_is_a_layers_too():
    settings = Settings({"t": GRADIENT}, ["0.weight", "1.weight", "2.weight"])
    assert [settings.of(f"{number}.weight")[0]["t"] for number in range(3)] == [0, 1, 4]


def test_the_first_filter_that_is_in_the_name_counts():
    entries = [
        {"filter": "mlp", "value": [0.5, 1]},
        {"filter": "layers.1.", "value": 7},
        {"filter": "norm", "value": 9},
    ]
    settings = Settings({"density": entries, "lambda": entries[1:], "rule": "mergekit"}, NAMES)
    assert settings.of("model.layers.1.mlp.up_proj.weight") == (
        {"density": 0.625, "rule": "mergekit"},
        7,
    )
    assert settings.of("model.layers.1.self_attn.q_proj.weight")[0]["density"] == 7
    assert settings.of("model.norm.weight") == ({"density": 9, "rule": "mergekit"}, 9)
    assert settings.of("lm_head.weight") == ({"rule": "mergekit"}, 1.0)  # the method's default


def test_what_is_no_number_is_not_interpolated():
    settings = Settings({"a": [{"value": [True, False]}], "b": [{"value": ["x", "y", "z"]}]}, NAMES)
    found = [settings.of(f"model.layers.{number}.mlp.up_proj.weight")[0] for number in range(5)]
    assert [own["a"] for own in found] == [True, True, True, True, False]
    assert "".join(own["b"] for own in found) == "xxyyz"


def test_each_expert_has_its_own():
    mine = [{"filter": "mlp", "value": [0, 1]}]
    settings = Settings({"weights": [mine, 3, GRADIENT]}, NAMES)
    own, scaling = settings.of("model.layers.2.mlp.up_proj.weight")
    assert own == {"weights": [0.5, 3, 1]} and scaling == 1.0
    with pytest.raises(ValueError, match="weights: expert 1 of 3 has none for lm_head.weight"):
        settings.of("lm_head.weight")


def test_plain_options_are_as_they_are():
    options = {"weights": [1, 2], "then": {"svc": {"alpha": 1}}, "density": 0.5}
    settings = Settings(options, NAMES)
    assert settings.of("lm_head.weight") == (options, 1.0) and not settings.vary
    assert not any(map(is_varied, (*options.values(), [], [{}], {"value": 1}, "value")))


@pytest.mark.parametrize(
    ("method", "options", "text"),
    [
        ("ties", {"density": [{"value": [0.5, 2]}]}, "density is 2"),
        ("ties", {"density": [{"value": ["x", 1]}]}, "wrong type"),
        ("ties", {"density": [{"value": []}]}, "give one value, or a list for the layers"),
        ("ties", {"density": [{"value": [[1]]}]}, "give one value, or a list for the layers"),
        ("ties", {"density": [{"value": 1, "layer": 2}]}, "filter, a text, and value are"),
        ("ties", {"density": [{"value": 1, "filter": 2}]}, "filter, a text, and value are"),
        ("ties", {"lambda": [{"value": [1, "x"]}]}, "lambda 'x': one finite number"),
        ("ties", {"lambda": 0.5}, "lambda 0.5: one for all is the scaling coefficient"),
        ("ties", {"sparsity": [{"value": 1}]}, "ties has no option 'sparsity'"),
        ("ties", {"k": [{"filter": "mlp", "value": 1}]}, "ties has no option 'k'"),
        ("ties", {"weights": [GRADIENT, 1]}, "weights has 2 values for 3 experts"),
        ("optmerge", {"rank_ratio": [{"value": [0.2, -1]}]}, "rank_ratio"),
    ],
)  # fmt: skip
def test_all_values_are_tried(method, options, text):
    with pytest.raises(ValueError, match=text):
        check_method(method, options, 3)


def test_values_that_never_meet_are_not_tried_together(tiny, tmp_path):
    density = [{"filter": "up_proj", "value": 0.95}, {"value": 0.5}]
    options = {"density": density, "epsilon": [{"filter": "mlp", "value": 0.04}, {"value": 0.3}]}
    merge(tiny.base, tiny.experts, tmp_path / "out", method="della", method_options=options)
    options["epsilon"][0]["value"] = 0.1
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj\.weight: epsilon is 0.1"):
        merge(tiny.base, tiny.experts, tmp_path / "no", method="della", method_options=options)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


OPTIONS = {
    "density": [[{"filter": "mlp", "value": [0.3, 0.6]}, {"value": 0.5}], 1.0, 0.7],
    "lambda": [{"filter": "mlp", "value": [0.2, 1.5]}, {"filter": "o_proj", "value": 0}],
}


def test_a_merge_takes_each_parameters_own(tiny, tmp_path):
    report = merge(tiny.base, tiny.experts, tmp_path / "whole", method="ties", seed=3,
                   method_options=OPTIONS, scaling_coefficient=0.5)  # fmt: skip
    base, merged = open_checkpoint(tiny.base), open_checkpoint(tmp_path / "whole")
    experts = {name: open_checkpoint(folder) for name, folder in tiny.experts.items()}
    names = [record["name"] for record in report.parameters]
    for name in names:
        layer = int(name.split(".layers.")[1][0])
        density = [(0.3, 0.6)[layer] if "mlp" in name else 0.5, 1.0, 0.7]
        scaling = (0.2, 1.5)[layer] if "mlp" in name else 0 if "o_proj" in name else 1
        stack = torch.stack([x[name].float() - base[name].float() for x in experts.values()])
        change = 0.5 * scaling * METHODS["ties"](stack, density=density)
        assert torch.equal(merged[name], (base[name].float() + change).half()), name
    in_memory = merge_tensors(base, experts, names, method="ties", method_options=OPTIONS)
    for name, change in in_memory.items():
        torch.testing.assert_close((base[name].float() + 0.5 * change).half(), merged[name])
    text = json.loads((tmp_path / "whole" / "merge_report.json").read_text())
    assert text["method_options"] == OPTIONS
    assert MergeReport(**text).recipe()["method_options"] == {"ties": OPTIONS}


def test_a_plan_keeps_them_for_its_parts(tiny, tmp_path):
    options = {"method": "ties", "method_options": OPTIONS, "max_shard_size": "20KB"}
    plan = plan_merge(tiny.base, tiny.experts, tmp_path / "parts", **options, max_part_size="6KB")
    plan = load_plan(plan.save(tmp_path / "plan.json"))
    assert plan.method_options == OPTIONS and len(plan.parts) > 3
    for number in reversed(range(len(plan.parts))):
        merge_part(plan, number)
    join(plan)
    merge(tiny.base, tiny.experts, tmp_path / "whole", **options)
    files = sorted(path.name for path in (tmp_path / "whole").glob("*safetensors*"))
    assert len(files) > 2
    for name in files:
        ours, theirs = (tmp_path / folder / name for folder in ("parts", "whole"))
        assert ours.read_bytes() == theirs.read_bytes()


def test_where_they_cannot_be_followed(tiny, tmp_path):
    arguments = {"method": "task_arithmetic", "method_options": {"lambda": GRADIENT}}
    with pytest.raises(ValueError, match="task_arithmetic by layer or filter asks how many layers"):
        merge_adapters({"a": tmp_path / "a"}, tmp_path / "out", **arguments)
    for options in (OPTIONS, {"density": [{"value": [0.1, 0.5]}]}):
        with pytest.raises(ValueError, match="one density for all experts, layers and tensors"):
            merge(tiny.base, tiny.experts, tmp_path / "out", method="ties", trim="model",
                  method_options=options)  # fmt: skip
    with pytest.raises(ValueError, match=r"layer_range \[0, 3\] of models that have 2 layers"):
        merge(tiny.base, tiny.experts, tmp_path / "out", layers=3)


def test_thresholds_over_the_model_with_drop_rates_by_layer(tiny, tmp_path):
    """Another rate in the second layer changes what stays of the first, by the threshold."""
    merged = []
    for rates in ([0.1, 0.1], [0.1, 0.9]):
        options = {"drop_rate": [{"value": rates}], "density": 0.3}
        merged.append(tmp_path / str(rates[1]))
        merge(tiny.base, tiny.experts, merged[-1], method="dare_ties", method_options=options,
              trim="model")  # fmt: skip
    one, other = map(open_checkpoint, merged)
    name = "language_model.model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(one[name], other[name])
