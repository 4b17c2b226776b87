"""The settings of adapters: every field of PEFT's decided, and followed as PEFT follows it."""

import dataclasses
import json
import math

import pytest
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from optmerge_core.checkpoints.formats import CheckpointError
from optmerge_core.checkpoints.lora_settings import CONVERT, EXACT, FIELDS, HARMLESS, LoraSettings

PLAIN = {"peft_type": "LORA", "target_modules": ["q_proj"]}
REFUSED = {field: remedy for field, remedy in FIELDS.items() if remedy not in (EXACT, HARMLESS)}
MODULES = [
    *(f"model.layers.{i}.self_attn.{kind}" for i in (0, 1, 11) for kind in ("q_proj", "o_proj")),
    *("model.vision.blocks.1.layers.0.q_proj", "layers.1.q_proj", "lm_head", "q_proj"),
]


@pytest.fixture
def read(tmp_path):
    def read(**settings) -> LoraSettings:
        (tmp_path / "adapter_config.json").write_text(json.dumps(PLAIN | settings))
        return LoraSettings(tmp_path / "adapter_config.json")

    return read


def test_every_field_of_peft_is_decided():
    assert FIELDS.keys() == {field.name for field in dataclasses.fields(LoraConfig)}


@pytest.mark.parametrize("field", REFUSED)
def test_what_no_merge_can_follow_is_refused_by_name(read, field):
    read(**{field: None})
    with pytest.raises(CheckpointError, match=rf"adapter_config\.json: the adapter uses {field}; "):
        read(**{field: {"a": 1}})


def test_what_says_nothing_about_weights_is_taken(read):
    taken = {field: "all" for field, meaning in FIELDS.items() if meaning == HARMLESS}
    assert read(**taken).start is None


@pytest.mark.parametrize("value", [True, {"a": 1}, ["a"], "a"])
def test_what_only_a_newer_peft_knows_is_refused_where_it_is_on(read, value):
    read(new_variant=None, new_size=16)
    with pytest.raises(CheckpointError, match="the adapter uses new_variant"):
        read(new_variant=value)


@pytest.mark.parametrize(
    ("given", "start"),
    [(True, None), (False, None), (None, None), ("gaussian", None), ("eva", None), ("mica", None)]
    + [("orthogonal", None), ("pissa", "pissa"), ("olora", "olora"), ("OLoRA", "olora")],
)
def test_what_the_adapter_began_with(read, given, start):
    assert read(init_lora_weights=given).start == start


@pytest.mark.parametrize("given", ["corda", "lora_ga", "pissa_niter_4", "loftq", "a_new_one"])
def test_a_beginning_that_cannot_be_repeated_is_refused(read, given):
    with pytest.raises(CheckpointError, match=f"init_lora_weights '{given}' changed") as error:
        read(init_lora_weights=given)
    remedy = "merge_and_unload" if given == "loftq" else "path_initial_model_for_weight_conversion"
    assert remedy in str(error.value) and (given == "loftq" or CONVERT in str(error.value))


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["self_attn.q_proj", "model.layers.11.self_attn.o_proj"]},
        {"target_modules": r".*\.[01]\..*_proj"},
        {"target_modules": "q_proj"},
        {"target_modules": []},
        {"target_modules": ["q_proj", "o_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
        {"target_modules": ["q_proj", "o_proj"], "exclude_modules": ".*vision.*"},
        {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": [1, 11]},
        {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": 0},
        {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": []},
        {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
        {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": ["h", "blocks"]},
        {"target_modules": ["layers.1.q_proj", "q_proj"], "layers_to_transform": [0]},
        {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head", r"layers\.1"]},
        {"target_modules": None, "target_parameters": ["lm_head.weight"]},
    ],
)
def test_the_modules_that_peft_gives_factors(read, settings):
    config, ours = LoraConfig(**settings), read(**settings)
    for module in MODULES:
        assert ours.applies_to(module) == bool(check_target_module_exists(config, module)), module


def test_parameters_and_rows_are_found_by_the_ends_of_their_paths(read):
    parameters = ["experts.gate_up_proj", "mlp.experts.down_proj", "other.gate_up_proj"]
    rows = {"embed_tokens": [3, 1], "lm_head": []}
    ours = read(target_parameters=parameters, trainable_token_indices=rows)
    nested = "model.layers.0.mlp.experts.base_layer.base_layer"
    assert ours.parameters_of(nested) == ["gate_up_proj", "down_proj"]
    assert ours.parameters_of("model.layers.0.other") == ["gate_up_proj"]
    assert ours.parameters_of("model.layers.0.mlp") == []
    assert ours.tokens("model.embed_tokens") == [3, 1] and ours.tokens("lm_head") == []
    assert read(trainable_token_indices=[5]).tokens("any") == [5]


def test_all_linear_stands_for_any(read):
    assert all(read(target_modules="all-linear").applies_to(module) for module in MODULES)


@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_rank_and_scale_are_those_that_peft_computes(read, rank_stabilised):
    ranks = {"layers.1..*": 3, "^model.*q_proj": 5, "lm_head": 7}
    alphas = {"o_proj": 9, ".*": 2.5}
    ours = read(
        r=4, lora_alpha=6, rank_pattern=ranks, alpha_pattern=alphas, use_rslora=rank_stabilised
    )
    for module in MODULES:
        rank = ranks.get(get_pattern_key(ranks, module), 4)
        alpha = alphas.get(get_pattern_key(alphas, module), 6)
        assert ours.rank(module) == rank
        assert ours.scale(module) == alpha / (math.sqrt(rank) if rank_stabilised else rank)
    assert read().rank("x") == LoraConfig().r and read().scale("x") == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "IA3"}, "of type IA3, not LORA"),
        ({"target_modules": None}, "target_modules is not a text or a list of texts"),
        ({"target_modules": "("}, "target_modules is no regular expression"),
        ({"layers_to_transform": "1"}, "layers_to_transform is not a number or more"),
        ({"layers_pattern": "h"}, "layers_pattern needs layers_to_transform"),
        ({"target_modules": "q", "layers_to_transform": 1}, "and this a list of target_modules"),
        ({"r": 0}, "r is not a whole number above 0"),
        ({"rank_pattern": {"x": 1.5}}, "rank_pattern is not a whole number above 0"),
        ({"lora_alpha": None}, "lora_alpha is not a number"),
        ({"alpha_pattern": ["x"]}, "alpha_pattern is not a mapping"),
        ({"alpha_pattern": {"(": 1}}, "alpha_pattern is no regular expression"),
    ],
)
def test_settings_that_mean_nothing_are_refused(read, settings, message):
    with pytest.raises(CheckpointError, match=message):
        read(**settings)
