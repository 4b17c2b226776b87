"""The same parameter under another name."""

import pytest

from optmerge_core.checkpoints.names import (
    closest_names,
    language_name,
    layer_index,
    module_kind,
    other_names,
)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("language_model.model.layers.0.up.weight", "model.language_model.layers.0.up.weight"),
        ("model.layers.0.mlp.up_proj.weight", "model.language_model.layers.0.mlp.up_proj.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("visual.blocks.0.mlp.fc1.weight", "model.visual.blocks.0.mlp.fc1.weight"),
        ("vision_tower.vision_model.encoder.layers.0.ls1", "vision_tower.encoder.layers.0.ls1"),
        ("multi_modal_projector.linear_1.weight", "model.multi_modal_projector.linear_1.weight"),
    ],
)  # fmt: skip
def test_other_names_of_one_parameter(ours, theirs):
    both = "image_newline"
    assert other_names([both, ours], [theirs, both]) == {ours: theirs}
    assert other_names([theirs], [ours]) == {theirs: ours}
    assert other_names([ours], [ours]) == {}


def test_other_names_must_be_unmistakable():
    assert other_names(["model.norm.weight"], ["language_model.norm.weight", "norm.weight"]) == {}
    assert other_names(["a.norm", "model.a.norm"], ["language_model.a.norm"]) == {}
    assert other_names(["layers.0.weight"], ["layers.1.weight"]) == {}
    ours, theirs = "model.a.norm", "language_model.a.norm"
    assert other_names([ours, theirs], [theirs]) == {}  # theirs is ours of that name


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("model.language_model.layers.1.up.weight", "language_model.model.layers.1.up.weight"),
        ("model.layers.1.up.weight", "language_model.model.layers.1.up.weight"),
        ("thinker.model.layers.1.up.weight", "language_model.model.layers.1.up.weight"),
        ("model.vision_model.layers.1.up.weight", "vision_model.layers.1.up.weight"),
        ("model.layers.1.experts.4.up.weight", "language_model.model.layers.1.experts.4.up.weight"),
        ("model.layers.4.experts.4.up.weight", None),  # not another layer's expert of that number
        ("model.layers.7.up.weight", None),
        ("model.visual.merger.mlp.0.weight", "visual.merger.mlp.0.weight"),
        ("model.image_newline", "image_newline"),
    ],
)  # fmt: skip
def test_closest_names(name, found):
    base = (
        *(f"language_model.model.layers.{i}.up.weight" for i in range(3)),
        *(f"language_model.model.layers.{i}.experts.4.up.weight" for i in range(3)),
        *("vision_model.layers.1.up.weight", "visual.merger.mlp.0.weight", "image_newline"),
    )
    assert closest_names(name, base) == ([found] if found else [])


def test_names_that_no_word_tells_apart_are_all_given():
    both = ["draft.model.layers.0.up.weight", "main.model.layers.0.up.weight"]
    assert closest_names("model.layers.0.up.weight", both) == both
    both = ["thinker.model.layers.0.up.weight", "talker.model.layers.0.up.weight"]
    assert closest_names("model.layers.0.up.weight", both) == both[:1]  # a talker is no text model


@pytest.mark.parametrize(
    "tower",
    [
        "vision_tower.vision_model.encoder", "model.vision_model.encoder", "visual", "audio_tower",
        "image_tower.encoder", "model.connector.perceiver_resampler", "vpm.encoder",
    ],
)  # fmt: skip
def test_a_tower_s_layer_is_no_language_model_s(tower):
    end = "layers.1.self_attn.q_proj.weight"
    for language in (
        "language_model.model",
        "model.language_model",
        "model.text_model",
        "llm.model",
    ):
        both = [f"{language}.{end}", f"{tower}.{end}"]
        assert closest_names(end, both) == closest_names(f"model.{end}", both) == both[:1]
        assert closest_names(both[1], both) == closest_names(f"model.{both[1]}", both) == both[1:]
        assert closest_names(f"model.{end}", both[1:]) == closest_names(both[1], both[:1]) == []


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("language_model.model.layers.0.up.weight", "model.layers.0.up.weight"),
        ("model.text_model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("model.language_model.norm.weight", "model.norm.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("model.visual.blocks.0.attn.qkv.weight", None),
        ("vision_model.layers.0.up.weight", None),
        ("multi_modal_projector.linear_1.weight", None),
    ],
)
def test_language_name(name, own):
    assert language_name(name) == own


@pytest.mark.parametrize(
    ("name", "layer", "kind"),
    [
        ("language_model.model.layers.11.self_attn.q_proj.weight", 11, "q_proj"),
        ("model.layers.3.mlp.up_proj.bias", 3, "up_proj"),
        ("vision_tower.encoder.layer.2.mlp.fc1.weight", 2, "fc1"),
        ("lm_head.weight", None, "lm_head"),
    ],
)
def test_layer_and_kind(name, layer, kind):
    assert layer_index(name) == layer
    assert module_kind(name) == kind
