"""Names as published checkpoints have them, with their shapes: what merges, what is the base's."""

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
    ("Qwen/Qwen2-Audio-7B", "qwen2_audio"): (
        {
            "language_model.model.layers.31.self_attn.q_proj.weight": (4096, 4096),
            "language_model.model.layers.31.mlp.down_proj.weight": (4096, 11008),
        },
        {
            "language_model.model.layers.31.self_attn.q_proj.bias": (4096,),
            "language_model.model.embed_tokens.weight": (156032, 4096),
            "language_model.lm_head.weight": (156032, 4096),
            "audio_tower.layers.0.self_attn.q_proj.weight": (1280, 1280),
            "audio_tower.layers.0.fc1.weight": (5120, 1280),
            "multi_modal_projector.linear.weight": (4096, 1280),
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
    ("Qwen/Qwen3.5-27B", "qwen3_5"): (  # shapes of the class's defaults
        {
            "model.language_model.layers.0.linear_attn.in_proj_qkv.weight": (8192, 4096),
            "model.language_model.layers.0.linear_attn.in_proj_a.weight": (32, 4096),
            "model.language_model.layers.0.linear_attn.out_proj.weight": (4096, 4096),
            "model.language_model.layers.3.self_attn.q_proj.weight": (8192, 4096),
        },
        {
            "model.language_model.layers.0.linear_attn.conv1d.weight": (8192, 1, 4),
            "model.language_model.layers.0.linear_attn.A_log": (32,),
            "model.language_model.layers.0.linear_attn.dt_bias": (32,),
            "model.visual.blocks.0.attn.qkv.weight": (3456, 1152),
            "mtp.layers.0.self_attn.q_proj.weight": (8192, 4096),
            "mtp.fc.weight": (4096, 8192),
        },
    ),
    ("Qwen/Qwen2.5-Omni-7B", "qwen2_5_omni"): (
        {"thinker.model.layers.0.self_attn.q_proj.weight": (3584, 3584)},
        {
            "thinker.lm_head.weight": (152064, 3584),
            "thinker.audio_tower.layers.0.self_attn.q_proj.weight": (1280, 1280),
            "thinker.visual.blocks.0.attn.q.weight": (1280, 1280),
            "talker.model.layers.0.mlp.up_proj.weight": (18944, 896),
            "talker.thinker_to_talker_proj.weight": (896, 3584),
            "token2wav.code2wav_dit_model.transformer_blocks.0.attn.to_q.weight": (1024, 1024),
        },
    ),
    ("Qwen/Qwen3-Omni-30B-A3B-Instruct", "qwen3_omni_moe"): (
        {
            "thinker.model.layers.0.mlp.experts.127.up_proj.weight": (768, 2048),
            "thinker.model.layers.0.mlp.gate.weight": (128, 2048),
        },
        {
            "thinker.audio_tower.layers.0.fc1.weight": (5120, 1280),
            "talker.model.layers.0.mlp.experts.127.up_proj.weight": (384, 1024),
            "talker.code_predictor.model.layers.0.mlp.up_proj.weight": (3072, 1024),
            "code2wav.pre_transformer.layers.0.self_attn.q_proj.weight": (1024, 1024),
        },
    ),
    ("google/gemma-3n-E4B-it", "gemma3n"): (
        {
            "model.language_model.layers.0.altup.modality_router.weight": (4, 2048),
            "model.language_model.layers.0.laurel.linear_left.weight": (64, 2048),
            "model.language_model.layers.0.per_layer_input_gate.weight": (256, 2048),
        },
        {
            "model.language_model.layers.0.altup.correct_output_scale": (2048,),
            "model.language_model.embed_tokens_per_layer.weight": (262144, 8960),
            "model.embed_vision.embedding_projection.weight": (2048, 2048),
            "model.audio_tower.conformer.0.attention.attn.q_proj.weight": (1536, 1536),
        },
    ),
    ("meta-llama/Llama-4-Scout-17B-16E-Instruct", "llama4"): (
        {
            "language_model.model.layers.0.feed_forward.experts.gate_up_proj": (16, 5120, 16384),
            "language_model.model.layers.0.feed_forward.router.weight": (16, 5120),
            "language_model.model.layers.0.feed_forward.shared_expert.up_proj.weight": (8192, 5120),
        },
        {
            "language_model.lm_head.weight": (202048, 5120),
            "vision_model.model.layers.0.self_attn.q_proj.weight": (1408, 1408),
            "multi_modal_projector.linear_1.weight": (5120, 4096),
        },
    ),
    ("meta-llama/Llama-3.2-11B-Vision", "mllama"): (
        {
            "language_model.model.layers.3.cross_attn.k_proj.weight": (1024, 4096),
            "language_model.model.layers.4.self_attn.k_proj.weight": (1024, 4096),
        },
        {
            "language_model.model.layers.3.cross_attn_attn_gate": (1,),
            "language_model.model.embed_tokens.weight": (128264, 4096),
            "vision_model.global_transformer.layers.0.self_attn.q_proj.weight": (1280, 1280),
            "multi_modal_projector.weight": (4096, 7680),
        },
    ),
    ("mistralai/Mistral-Small-3.1-24B-Instruct-2503", "mistral3"): (
        {"language_model.model.layers.0.mlp.up_proj.weight": (32768, 5120)},
        {
            "vision_tower.transformer.layers.0.attention.q_proj.weight": (1024, 1024),
            "multi_modal_projector.patch_merger.merging_layer.weight": (1024, 4096),
        },
    ),
    ("microsoft/Phi-4-multimodal-instruct", "phi4mm"): (
        {"model.layers.0.self_attn.qkv_proj.base_layer.weight": (5120, 3072)},
        {
            "model.layers.0.self_attn.qkv_proj.lora_A.vision.weight": (256, 3072),
            "model.layers.0.self_attn.qkv_proj.lora_B.speech.weight": (5120, 320),
            "model.embed_tokens_extend.image_embed.img_projection.0.weight": (3072, 1152),
        },
    ),
}
