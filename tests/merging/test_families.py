import pytest

from optmerge_core.checkpoints.names import layer_index, module_kind, other_names
from optmerge_core.checkpoints.open import open_checkpoint
from optmerge_core.merging.families import mergeable, summary

LINEAR = "linear layer of the language model"
FUSED = "experts fused in one tensor"
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


# Names as published checkpoints have them, with their shapes: what merges, what is the base's.
HUB = {
    ("OpenGVLab/InternVL2_5-1B", "internvl_chat"): (
        {
            "language_model.model.layers.23.self_attn.k_proj.weight": (128, 896),
            "language_model.model.layers.23.mlp.gate_proj.weight": (4864, 896),
        },
        {
            "language_model.model.layers.23.self_attn.k_proj.bias": (128,),
            "language_model.model.layers.23.input_layernorm.weight": (896,),
            "language_model.model.embed_tokens.weight": (151674, 896),
            "language_model.lm_head.weight": (151674, 896),
            "vision_model.embeddings.patch_embedding.weight": (1024, 3, 14, 14),
            "vision_model.encoder.layers.0.attn.qkv.weight": (3072, 1024),
            "vision_model.encoder.layers.0.mlp.fc1.weight": (4096, 1024),
            "mlp1.1.weight": (896, 4096),
        },
    ),
    ("OpenGVLab/InternVL2_5-2B", "internvl_chat"): (  # InternLM2: fused queries, keys, values
        {
            "language_model.model.layers.0.attention.wqkv.weight": (4096, 2048),
            "language_model.model.layers.0.attention.wo.weight": (2048, 2048),
            "language_model.model.layers.0.feed_forward.w1.weight": (8192, 2048),
        },
        {
            "language_model.model.layers.0.attention_norm.weight": (2048,),
            "language_model.model.tok_embeddings.weight": (92553, 2048),
            "language_model.output.weight": (92553, 2048),
            "vision_model.encoder.layers.0.attn.proj.weight": (1024, 1024),
            "mlp1.3.weight": (2048, 2048),
        },
    ),
    ("OpenGVLab/InternVL2-4B", "internvl_chat"): (  # Phi-3
        {
            "language_model.model.layers.31.self_attn.qkv_proj.weight": (9216, 3072),
            "language_model.model.layers.31.mlp.gate_up_proj.weight": (16384, 3072),
        },
        {
            "language_model.model.norm.weight": (3072,),
            "language_model.lm_head.weight": (32020, 3072),
        },
    ),
    ("OpenGVLab/InternVL3-1B-hf", "internvl"): (
        {"language_model.model.layers.0.self_attn.q_proj.weight": (896, 896)},
        {
            "vision_tower.encoder.layer.0.attention.q_proj.weight": (1024, 1024),
            "multi_modal_projector.linear_1.weight": (896, 4096),
        },
    ),
    ("Qwen/Qwen2-VL-7B", "qwen2_vl"): (
        {
            "model.layers.27.self_attn.q_proj.weight": (3584, 3584),
            "model.layers.27.mlp.down_proj.weight": (3584, 18944),
        },
        {
            "model.layers.27.self_attn.q_proj.bias": (3584,),
            "model.embed_tokens.weight": (152064, 3584),
            "lm_head.weight": (152064, 3584),
            "visual.blocks.0.attn.qkv.weight": (3840, 1280),
            "visual.blocks.0.mlp.fc1.weight": (5120, 1280),
            "visual.merger.mlp.0.weight": (5120, 5120),
            "visual.patch_embed.proj.weight": (1280, 3, 2, 14, 14),
        },
    ),
    ("Qwen/Qwen2.5-VL-7B-Instruct", "qwen2_5_vl"): (
        {"model.layers.0.mlp.gate_proj.weight": (18944, 3584)},
        {
            "visual.blocks.31.mlp.gate_proj.weight": (3420, 1280),
            "visual.merger.mlp.2.weight": (3584, 5120),
        },
    ),
    ("Qwen/Qwen3-VL-4B-Instruct", "qwen3_vl"): (
        {"model.language_model.layers.35.self_attn.o_proj.weight": (2560, 4096)},
        {
            "model.language_model.layers.35.self_attn.q_norm.weight": (128,),
            "model.language_model.embed_tokens.weight": (151936, 2560),
            "model.visual.blocks.0.mlp.linear_fc1.weight": (4096, 1024),
            "model.visual.deepstack_merger_list.0.linear_fc1.weight": (4096, 4096),
            "model.visual.merger.linear_fc2.weight": (2560, 4096),
            "model.visual.pos_embed.weight": (2304, 1024),
        },
    ),
    ("llava-hf/llava-1.5-7b-hf", "llava"): (
        {"language_model.model.layers.31.self_attn.v_proj.weight": (4096, 4096)},
        {
            "language_model.lm_head.weight": (32064, 4096),
            "vision_tower.vision_model.encoder.layers.0.self_attn.v_proj.weight": (1024, 1024),
            "vision_tower.vision_model.embeddings.position_embedding.weight": (577, 1024),
            "multi_modal_projector.linear_2.weight": (4096, 4096),
        },
    ),
    ("liuhaotian/llava-v1.6-vicuna-7b", "llava_llama"): (
        {"model.layers.0.mlp.up_proj.weight": (11008, 4096)},
        {
            "model.mm_projector.0.weight": (4096, 1024),
            "model.image_newline": (4096,),
            "model.vision_tower.vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight": (
                4096,
                1024,
            ),
        },
    ),
    ("llava-hf/llava-onevision-qwen2-7b-ov-hf", "llava_onevision"): (
        {"language_model.model.layers.0.self_attn.q_proj.weight": (3584, 3584)},
        {
            "image_newline": (3584,),
            "vision_tower.vision_model.encoder.layers.0.mlp.fc2.weight": (1152, 4304),
            "multi_modal_projector.linear_1.weight": (3584, 1152),
        },
    ),
    ("google/gemma-3-4b-it", "gemma3"): (
        {"language_model.model.layers.0.self_attn.k_proj.weight": (1024, 2560)},
        {
            "language_model.model.layers.0.self_attn.k_norm.weight": (256,),
            "language_model.model.embed_tokens.weight": (262208, 2560),
            "multi_modal_projector.mm_input_projection_weight": (1152, 2560),
            "vision_tower.vision_model.encoder.layers.0.self_attn.k_proj.weight": (1152, 1152),
        },
    ),
    ("HuggingFaceTB/SmolVLM-Instruct", "idefics3"): (
        {"model.text_model.layers.0.mlp.down_proj.weight": (2048, 8192)},
        {
            "lm_head.weight": (49155, 2048),
            "model.text_model.embed_tokens.weight": (49155, 2048),
            "model.connector.modality_projection.proj.weight": (2048, 10368),
            "model.vision_model.encoder.layers.0.self_attn.q_proj.weight": (1152, 1152),
        },
    ),
    ("HuggingFaceTB/SmolVLM2-2.2B-Instruct", "smolvlm"): (
        {"model.text_model.layers.23.self_attn.o_proj.weight": (2048, 2048)},
        {"model.vision_model.encoder.layers.26.self_attn.out_proj.weight": (1152, 1152)},
    ),
    ("internlm/internlm2-7b", "internlm2"): (
        {"model.layers.0.attention.wqkv.weight": (6144, 4096)},
        {"model.tok_embeddings.weight": (92544, 4096), "output.weight": (92544, 4096)},
    ),
    ("lmms-lab/LLaVA-Video-7B-Qwen2", "llava_qwen"): (
        {"model.layers.0.self_attn.q_proj.weight": (3584, 3584)},
        {"model.mm_projector.0.weight": (3584, 1152), "model.embed_tokens.weight": (152064, 3584)},
    ),
    ("Qwen/Qwen1.5-MoE-A2.7B", "qwen2_moe"): (
        {
            "model.layers.0.mlp.experts.59.up_proj.weight": (1408, 2048),
            "model.layers.0.mlp.gate.weight": (60, 2048),
            "model.layers.0.mlp.shared_expert_gate.weight": (1, 2048),
        },
        {"model.layers.0.self_attn.q_proj.bias": (2048,)},
    ),
}


@pytest.mark.parametrize(("checkpoint", "model_type"), HUB)
def test_names_of_published_checkpoints(checkpoint, model_type):
    merging, kept = HUB[checkpoint, model_type]
    assert mergeable(kept | merging, model_type) == list(merging)
    with pytest.warns(UserWarning, match="no rule of its own"):  # the default takes the same
        assert mergeable(kept | merging, "mystery") == list(merging)


def test_a_mixture_of_experts_in_one_tensor_is_the_bases_with_a_notice():
    shapes = {
        "model.language_model.layers.0.self_attn.q_proj.weight": (4096, 2048),
        "model.language_model.layers.0.mlp.gate.weight": (128, 2048),
        "model.language_model.layers.0.mlp.experts.gate_up_proj": (128, 2048, 1536),
    }
    with pytest.warns(UserWarning, match="1 tensors hold.*gate_up_proj.*scope 'all' merges them"):
        assert mergeable(shapes, "qwen3_vl_moe") == list(shapes)[:2]
    assert mergeable(shapes, "qwen3_vl_moe", scope="all") == list(shapes)


def test_scope_all_takes_every_shape_with_entries_without_a_notice():
    shapes = {"a": (2, 3), "b.bias": (4,), "conv": (2, 3, 4, 4), "scale": (), "empty": (0, 3)}
    assert mergeable(shapes, "mystery", scope="all") == ["a", "b.bias", "conv"]
    with pytest.raises(ValueError, match="no parameter to merge"):
        mergeable({"scale": ()}, "llama", scope="all")
    with pytest.raises(ValueError, match="scope 'some': give 'linear' or 'all'"):
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


def test_summary_has_a_row_for_each_kind():
    shapes = {
        "lm_head.weight": (64, 8),
        "model.embed_tokens.weight": (64, 8),
        "model.layers.0.mlp.up_proj.weight": (16, 8),
        "model.layers.0.mlp.experts.down_proj": (4, 8, 8),
        "model.layers.0.self_attn.q_proj.bias": (8,),
        "model.layers.0.post_attention_layernorm.weight": (8,),
        "model.layers.10.mlp.up_proj.weight": (16, 8),
        "model.norm.weight": (8,),
        "visual.blocks.0.attn.qkv.weight": (12, 4),
        "visual.blocks.0.attn.qkv.bias": (12,),
        "visual.blocks.1.attn.qkv.weight": (12, 4),
        "visual.patch_embed.proj.weight": (4, 3, 2, 2, 2),
    }
    with pytest.warns(UserWarning, match="mixture of experts"):
        table = summary(shapes, "qwen2_vl")
    assert list(table.columns) == ["parameters", "count", "shapes", "entries", "merges", "why"]
    assert table.values.tolist() == [
        ["lm_head.weight", 1, "64 × 8", 512, False, "head"],
        ["model.embed_tokens.weight", 1, "64 × 8", 512, False, "embeddings"],
        ["model.layers.*.mlp.up_proj.weight", 2, "16 × 8", 256, True, LINEAR],
        ["model.layers.*.mlp.experts.down_proj", 1, "4 × 8 × 8", 256, False, FUSED],
        ["model.layers.*.self_attn.q_proj.bias", 1, "8", 8, False, "bias"],
        ["model.layers.*.post_attention_layernorm.weight", 1, "8", 8, False, "norm"],
        ["model.norm.weight", 1, "8", 8, False, "norm"],
        ["visual.*", 4, "12 × 4, 12, …", 204, False, "outside the language model"],
    ]
    table = summary(shapes | {"scale": ()}, "qwen2_vl", scope="all")
    assert table["merges"].tolist() == [True] * 8 + [False]
    assert table["why"][7] == "scope all: outside the language model"
    assert table["count"].sum() == len(shapes) + 1


@pytest.mark.parametrize("name", [name for name, _ in HUB])
def test_summary_counts_what_merges(name):
    (model_type,) = (kind for checkpoint, kind in HUB if checkpoint == name)
    merging, kept = HUB[name, model_type]
    table = summary(kept | merging, model_type)
    assert table.groupby("merges")["count"].sum().to_dict() == {
        True: len(merging),
        False: len(kept),
    }
    assert set(table["why"][table["merges"]]) == {LINEAR}
    assert LINEAR not in set(table["why"][~table["merges"]])


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
