import pytest
from published import HUB

from optmerge_core.checkpoints.names import module_kind
from optmerge_core.checkpoints.open import open_checkpoint
from optmerge_core.merging.families import mergeable

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


@pytest.mark.parametrize(("checkpoint", "model_type"), HUB)
def test_names_of_published_checkpoints(checkpoint, model_type):
    merging, kept = HUB[checkpoint, model_type]
    assert mergeable(kept | merging, model_type) == list(merging)
    with pytest.warns(UserWarning, match="no rule of its own"):  # the default takes the same
        assert mergeable(kept | merging, "mystery") == list(merging)


def test_a_mixture_of_experts_in_one_tensor_merges_and_its_router_if_asked():
    shapes = {
        "model.language_model.layers.0.self_attn.q_proj.weight": (4096, 2048),
        "model.language_model.layers.0.mlp.gate.weight": (128, 2048),
        "model.language_model.layers.0.mlp.experts.gate_up_proj": (128, 2048, 1536),
    }
    left = [name for name in shapes if "mlp.gate." not in name]
    for scope in ("linear", "all"):
        assert mergeable(shapes, "qwen3_vl_moe", scope) == list(shapes)
        assert mergeable(shapes, "qwen3_vl_moe", scope, router="base") == left
    unknown = "model.language_model.layers.0.mlp.experts.bases"
    shapes[unknown] = (128, 2048, 4)
    with pytest.warns(UserWarning, match=f"1 tensors .* no known name .*{unknown}.*scope 'all'"):
        assert mergeable(shapes, "qwen3_vl_moe") == list(shapes)[:-1]


def test_scope_all_takes_every_shape_with_entries_without_a_notice():
    shapes = {"a": (2, 3), "b.bias": (4,), "conv": (2, 3, 4, 4), "scale": (), "empty": (0, 3)}
    assert mergeable(shapes, "mystery", scope="all") == ["a", "b.bias", "conv"]
    with pytest.raises(ValueError, match="no parameter to merge"):
        mergeable({"scale": ()}, "llama", scope="all")
    with pytest.raises(ValueError, match="scope 'speech'.*'llama', has no talker"):
        mergeable(shapes | {"model.layers.0.x.weight": (2, 2)}, "llama", scope="speech")
    with pytest.raises(ValueError, match="scope 'some': give 'linear', 'speech' or 'all'"):
        mergeable(shapes, "llama", scope="some")


def test_default_rule_on_a_made_up_model():
    shapes = {
        "brain.decoder.layers.0.attend.fused_qkv.weight": (24, 8),
        "brain.decoder.layers.11.feed.in.weight": (32, 8),
        "brain.decoder.layers.0.attend.fused_qkv.bias": (24,),
        "brain.decoder.layers.0.conv.weight": (8, 1, 4),
        "brain.layers_norm.weight": (8, 8),
        "brain.wordembed.layers.0.up.weight": (8, 8),
        "eyes.vit.layers.0.attend.weight": (8, 8),
        "eyes.Visual.layers.0.attend.weight": (8, 8),
        "ears.speech_encoder.layers.0.attend.weight": (8, 8),
        "bridge.image_projector.layers.0.up.weight": (8, 8),
        "brain.decoder.layers.0.attend.fused_qkv.lora_A.weight": (2, 8),
        "eyes.siglip.layers.0.up.weight": (8, 8),
        "invite.layers.0.up.weight": (8, 8),  # not a vit
    }
    merging = [*list(shapes)[:2], "invite.layers.0.up.weight"]
    with pytest.warns(UserWarning, match="model type None has no rule"):
        assert mergeable(shapes, None) == merging


def test_nothing_to_merge_is_an_error():
    with pytest.raises(ValueError, match="qwen2.*blocks.0.weight"):
        mergeable({"blocks.0.weight": (4, 4)}, "qwen2")
