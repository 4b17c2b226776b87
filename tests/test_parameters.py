import pytest

from optmerge_core.checkpoints import open_checkpoint
from optmerge_core.parameters import layer_index, mergeable, module_kind

LINEARS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def names(prefix: str, vision: str) -> dict[str, tuple[int, ...]]:
    """A checkpoint of one family: two matrices that merge, and one of each kind that does not."""
    return {
        f"{prefix}layers.0.self_attn.q_proj.weight": (8, 8),
        f"{prefix}layers.11.mlp.down_proj.weight": (8, 16),
        f"{prefix}layers.0.self_attn.q_proj.bias": (8,),
        f"{prefix}layers.0.input_layernorm.weight": (8,),
        f"{prefix}embed_tokens.weight": (32, 8),
        f"{vision}.layers.0.mlp.fc1.weight": (8, 8),
        "mlp1.1.weight": (8, 8),
        "lm_head.weight": (32, 8),
    }


@pytest.mark.parametrize(
    ("model_type", "prefix", "vision"),
    [
        ("internvl", "language_model.model.", "vision_tower.encoder"),
        ("internvl", "model.language_model.", "model.vision_tower.encoder"),
        ("internvl_chat", "language_model.model.", "vision_model.encoder"),
        ("qwen2_vl", "model.", "visual.blocks"),
        ("qwen2_vl", "model.language_model.", "model.visual.blocks"),
        ("qwen2_5_vl", "model.", "visual.blocks"),
        ("qwen2", "model.", "none"),
        ("llama", "model.", "none"),
    ],
)
def test_rules_take_the_language_models_matrices_only(model_type, prefix, vision):
    shapes = names(prefix, vision)
    assert mergeable(shapes, model_type) == list(shapes)[:2]


def test_names_on_disk_of_a_real_model(tiny):
    shapes = open_checkpoint(tiny.base).shapes()
    merging = mergeable(shapes, "internvl")
    assert len(merging) == 2 * len(LINEARS)
    assert {module_kind(name) for name in merging} == LINEARS
    assert all(name.startswith("language_model.model.layers.") for name in merging)


@pytest.mark.parametrize("vision", ["vision_tower", "audio_tower", "model.visual", "vit"])
def test_unknown_family_has_a_default_and_a_notice(vision):
    shapes = names("some.decoder.", vision)
    with pytest.warns(UserWarning, match="'mystery' has no rule"):
        assert mergeable(shapes, "mystery") == list(shapes)[:2]


def test_nothing_to_merge_is_an_error():
    with pytest.raises(ValueError, match="qwen2.*blocks.0.weight"):
        mergeable({"blocks.0.weight": (4, 4)}, "qwen2")


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
