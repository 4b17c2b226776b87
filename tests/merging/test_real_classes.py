"""Each family's real class, tiny: saved, merged, opened again, and asked to generate.

To add a family: its rule in `families.FAMILIES`, its entry here or in `tiny_families.py`, and a few
names of a published checkpoint in `published.py`.
"""

import json
import re
from itertools import permutations
from typing import NamedTuple

import pytest
import tiny_families
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from specialists import AUDIO
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from optmerge_core.checkpoints.open import open_checkpoint, open_expert
from optmerge_core.merging.families import FAMILIES as RULES
from optmerge_core.merging.merge import merge
from optmerge_core.methods import EXPERTS as COUNTS
from optmerge_core.methods.registry import METHODS

IMAGE = 5  # the token in whose place the features of an image stand
WEIGHTS = "model.safetensors"
Q, UP = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight"
BITS = {"float64": 53, "float32": 24, "float16": 11, "bfloat16": 8}  # of a dtype's significand
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TEXT = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "bos_token_id": 0,
    "eos_token_id": 1, "pad_token_id": 0, "max_position_embeddings": 128,
}  # fmt: skip
MOE = TEXT | {
    "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 8,
}  # fmt: skip
EXPERTS = r"model\.layers\.\d\.(self_attn\..+_proj|mlp\..+)\.weight"
VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip
QWEN_VISION = {
    "depth": 2, "hidden_size": 16, "out_hidden_size": 16, "num_heads": 2, "patch_size": 4,
    "intermediate_size": 24,
}  # fmt: skip
QWEN_TOKENS = {
    "image_token_id": IMAGE, "video_token_id": 6, "vision_start_token_id": 7,
    "vision_end_token_id": 8,
}  # fmt: skip
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
PIXELS = torch.linspace(-1, 1, 768).view(1, 3, 16, 16)
QWEN_INPUTS = {
    "pixel_values": torch.linspace(-1, 1, 384).view(4, 96),
    "image_grid_thw": torch.tensor([[1, 2, 2]]),
    "mm_token_type_ids": torch.tensor([[1, 0, 0]]),
}


class Family(NamedTuple):
    model: str
    """the class in transformers; its config's class has the same name but for the ending"""
    config: dict
    tokens: int = 0
    """placeholders of one image in the prompt"""
    inputs: dict = {}
    """what `generate` takes besides text"""
    linears: str | None = None
    """names on disk that merge, where modules in memory do not tell (mixtures of experts)"""


class InternVLChatConfig(PreTrainedConfig):
    model_type = "internvl_chat"

    def __init__(self, llm_config=None, **kwargs):
        super().__init__(**kwargs)
        self.llm_config = llm_config


class InternVLChatModel(PreTrainedModel):
    """Modules of InternVL2.5's remote code, by its names."""

    config_class = InternVLChatConfig
    _tied_weights_keys = None

    def __init__(self, config):
        super().__init__(config)
        block = {"attn": nn.ModuleDict({"qkv": nn.Linear(16, 48), "proj": nn.Linear(16, 16)})}
        block |= {"mlp": nn.ModuleDict({"fc1": nn.Linear(16, 24), "fc2": nn.Linear(24, 16)})}
        layers = nn.ModuleList([nn.ModuleDict(block)])
        self.vision_model = nn.ModuleDict({"encoder": nn.ModuleDict({"layers": layers})})
        self.mlp1 = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16))
        self.language_model = Qwen2ForCausalLM(Qwen2Config(**config.llm_config))
        self.post_init()

    def get_decoder(self):
        return self.language_model.model

    def generate(self, **inputs):
        return self.language_model.generate(**inputs)


def vision_language(text: str | None, vision: str | None, **more) -> dict:
    """A composite config from the tiny parts."""
    text_config = TEXT | ({"model_type": text} if text else {})
    return {
        "text_config": text_config,
        "vision_config": VISION | ({"model_type": vision} if vision else {}),
    } | more


FAMILIES = {
    "llama": Family("LlamaForCausalLM", TEXT),
    "mistral": Family("MistralForCausalLM", TEXT),
    "qwen2": Family("Qwen2ForCausalLM", TEXT | {"tie_word_embeddings": True}),
    "qwen2_moe": Family("Qwen2MoeForCausalLM", MOE, linears=EXPERTS),
    "qwen3": Family("Qwen3ForCausalLM", TEXT),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", MOE, linears=EXPERTS),
    "gemma": Family("GemmaForCausalLM", TEXT),
    "gemma2": Family("Gemma2ForCausalLM", TEXT),
    "gemma3_text": Family("Gemma3ForCausalLM", TEXT),
    "phi3": Family("Phi3ForCausalLM", TEXT),
    "qwen2_vl": Family(
        "Qwen2VLForConditionalGeneration",
        QWEN_TOKENS
        | {
            "text_config": TEXT | {"rope_parameters": ROPE},
            "vision_config": QWEN_VISION | {"embed_dim": 16, "mlp_ratio": 2},
        },
        1,
        QWEN_INPUTS,
    ),
    "qwen2_5_vl": Family(
        "Qwen2_5_VLForConditionalGeneration",
        QWEN_TOKENS
        | {
            "text_config": TEXT | {"rope_parameters": ROPE},
            "vision_config": QWEN_VISION | {"fullatt_block_indexes": [0], "window_size": 16},
        },
        1,
        QWEN_INPUTS,
    ),
    "qwen3_vl": Family(
        "Qwen3VLForConditionalGeneration",
        QWEN_TOKENS
        | {
            "text_config": TEXT | {"rope_parameters": ROPE},
            "vision_config": QWEN_VISION
            | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16},
        },
        1,
        QWEN_INPUTS,
    ),
    "qwen3_vl_moe": Family(
        "Qwen3VLMoeForConditionalGeneration",
        QWEN_TOKENS
        | {
            "text_config": MOE | {"rope_parameters": ROPE},
            "vision_config": QWEN_VISION
            | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16},
        },
        1,
        QWEN_INPUTS,
        r"model\.language_model\.layers\.\d\.(self_attn\..+_proj\.weight|mlp\..+)",
    ),
    "internvl": Family(
        "InternVLForConditionalGeneration",
        vision_language("qwen2", None, image_token_id=IMAGE, image_seq_length=1)
        | {"vision_config": VISION | {"image_size": [16, 16], "patch_size": [8, 8]}},
        1,
        {"pixel_values": PIXELS},
    ),
    "internvl_chat": Family("InternVLChatModel", {"llm_config": TEXT}),
    "llava": Family(
        "LlavaForConditionalGeneration",
        vision_language("llama", "clip_vision_model", image_token_index=IMAGE, image_seq_length=4),
        4,
        {"pixel_values": PIXELS},
    ),
    "llava_next": Family(
        "LlavaNextForConditionalGeneration",
        vision_language("mistral", "clip_vision_model", image_token_index=IMAGE),
    ),
    "llava_onevision": Family(
        "LlavaOnevisionForConditionalGeneration",
        vision_language(
            "qwen2", "siglip_vision_model", image_token_index=IMAGE, video_token_index=6,
            image_grid_pinpoints=[[16, 16]],
        ),
        10,  # twice four patches, and a line break for each of two rows
        {"pixel_values": PIXELS.expand(1, 2, -1, -1, -1), "image_sizes": torch.tensor([[16, 16]])},
    ),
    "gemma3": Family(
        "Gemma3ForConditionalGeneration",
        vision_language(
            None, None, mm_tokens_per_image=4, image_token_index=IMAGE, boi_token_index=7,
            eoi_token_index=8,
        ),
        4,
        {"pixel_values": PIXELS},
    ),
    "paligemma": Family(
        "PaliGemmaForConditionalGeneration",
        vision_language("gemma", "siglip_vision_model", image_token_index=IMAGE)
        | {"projection_dim": 16},
        4,
        {"pixel_values": PIXELS},
    ),
    "idefics2": Family(
        "Idefics2ForConditionalGeneration",
        vision_language("mistral", None, image_token_id=IMAGE)
        | {
            "perceiver_config": {
                "hidden_size": 16, "resampler_n_latents": 2, "resampler_depth": 1,
                "resampler_n_heads": 2, "resampler_head_dim": 8, "num_key_value_heads": 1,
            }
        },
    ),
    "idefics3": Family(
        "Idefics3ForConditionalGeneration",
        vision_language("llama", None, image_token_id=IMAGE, scale_factor=2),
        1,
        {"pixel_values": PIXELS[None]},
    ),
    "smolvlm": Family(
        "SmolVLMForConditionalGeneration",
        vision_language("llama", None, image_token_id=IMAGE, scale_factor=2),
        1,
        {"pixel_values": PIXELS[None]},
    ),
}  # fmt: skip

MULTIMODAL = {
    name: family
    for name, family in FAMILIES.items()
    if {"text_config", "llm_config"} & {*family.config}
} | {
    "mistral3": Family(
        "Mistral3ForConditionalGeneration",
        vision_language("mistral", "pixtral", image_token_id=IMAGE),
    ),
    "qwen2_audio": Family(
        "Qwen2AudioForConditionalGeneration",
        {"text_config": TEXT | {"model_type": "qwen2"}, "audio_config": AUDIO},
    ),
    "qwen2_5_omni_thinker": Family(
        "Qwen2_5OmniThinkerForConditionalGeneration",
        {
            "text_config": TEXT | {"rope_parameters": ROPE},
            "vision_config": QWEN_VISION | {"fullatt_block_indexes": [0], "window_size": 16},
            "audio_config": {k: AUDIO[k] for k in AUDIO if k != "model_type"} | {"output_dim": 16},
        },
    ),
}  # fmt: skip


def build(name: str) -> PreTrainedModel:
    """The family's tiny model, its weights drawn from a seed."""
    family = (FAMILIES | MULTIMODAL)[name]
    cls = globals().get(family.model) or getattr(transformers, family.model)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return cls(cls.config_class(**family.config)).eval()


def whole(folder) -> dict[str, torch.Tensor]:
    """All tensors of a folder, read without this package."""
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def linears_of(model: PreTrainedModel) -> set[bytes]:
    """Contents of the linear layers of the language model, as its modules tell, not their names."""
    modules = model.get_decoder().modules()
    return {m.weight.detach().numpy().tobytes() for m in modules if isinstance(m, nn.Linear)}


@pytest.fixture(scope="module", params=FAMILIES)
def study(request, tmp_path_factory):
    """A base model and two experts, everything in them moved, each saved in other shards."""
    root, model = tmp_path_factory.mktemp(request.param), build(request.param)
    model.save_pretrained(root / "base", max_shard_size="20KB")
    linears, generator = linears_of(model), torch.Generator().manual_seed(1)
    for expert, shard in (("ocr", "1MB"), ("chart", "9KB")):
        moved = build(request.param)
        for parameter in moved.parameters():
            noise = 0.01 * torch.randn(parameter.shape, generator=generator)
            parameter.data.add_(noise)
        moved.save_pretrained(root / expert, max_shard_size=shard)
    return request.param, root, linears


@pytest.mark.parametrize("method", ["task_arithmetic", "optmerge"])
def test_exactly_the_language_models_linear_layers_merge(study, tmp_path, method):
    name, root, linears = study
    family, base = FAMILIES[name], whole(root / "base")
    experts = [whole(root / expert) for expert in ("ocr", "chart")]
    assert all(not torch.equal(experts[0][n], base[n]) for n in base)

    options = {"steps": 5} if method == "optmerge" else {}
    folders = {"ocr": root / "ocr", "chart": root / "chart"}
    merge(root / "base", folders, tmp_path, method=method, method_options=options)
    merged = whole(tmp_path)

    if family.linears:
        expected = {n for n in base if re.fullmatch(family.linears, n)}
    else:
        expected = {n for n, tensor in base.items() if tensor.numpy().tobytes() in linears}
        assert len(expected) == len(linears) >= 8
    assert merged.keys() == base.keys()
    assert {n for n in base if not torch.equal(merged[n], base[n])} == expected
    if method == "task_arithmetic":
        for n in expected:
            total = base[n] + ((experts[0][n] - base[n]) + (experts[1][n] - base[n]))
            assert torch.equal(merged[n], total), n

    cls = globals().get(family.model) or getattr(transformers, family.model)
    model, info = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert model.config.model_type == name
    if not family.linears:
        assert linears_of(model) == {merged[n].numpy().tobytes() for n in expected}
    prompt = torch.tensor([[IMAGE] * family.tokens + [10, 11]])
    for ids, inputs in ((prompt, family.inputs), (prompt[:, -2:], {})):
        generated = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False,
            **inputs,
        )  # fmt: skip
        assert generated.shape[1] > ids.shape[1]


def test_every_rule_is_tested_on_a_model():
    # no class in transformers: by their names
    remote = {"llava_llama", "llava_qwen", "internlm2", "phi4mm"}
    others = {family.model_type or name for name, family in tiny_families.FAMILIES.items()}
    assert FAMILIES.keys() | others == RULES.keys() - remote


@pytest.mark.parametrize("path", ["", "model."])
@pytest.mark.parametrize("original", [True, False], ids=["hub's names", "memory's names"])
@pytest.mark.parametrize("name", MULTIMODAL)
def test_an_adapter_made_on_the_text_model_alone(tmp_path, name, original, path):
    """Its modules are `layers.0…` or `model.layers.0…`; a tower has layers that end alike."""
    model = build(name)
    model.save_pretrained(tmp_path / "base", save_original_format=original)
    stored = whole(tmp_path / "base")
    memory = {(t.shape, t.numpy().tobytes()): own for own, t in model.state_dict().items()}
    linears = len(linears_of(model))
    adapted = get_peft_model(model.get_decoder(), LoraConfig(r=2, target_modules="all-linear"))
    generator = torch.Generator().manual_seed(1)
    for own, parameter in adapted.named_parameters():
        if "lora_" in own:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(tmp_path / "adapter")
    file, prefix = tmp_path / "adapter/adapter_model.safetensors", "base_model.model."
    save_file({n.replace(prefix, prefix + path): t for n, t in load_file(file).items()}, file)
    adapted.merge_and_unload()

    expert = open_expert(tmp_path / "adapter", open_checkpoint(tmp_path / "base"))
    assert len(expert.changes) == linears >= 8
    for own, tensor in stored.items():
        if same := memory.get((tensor.shape, tensor.numpy().tobytes())):  # no mixture's experts
            torch.testing.assert_close(expert[own], model.state_dict()[same], atol=1e-6, rtol=0)


@pytest.fixture
def folder(tmp_path):
    """A function that writes tensors and a config as a model folder of tmp_path."""

    def write(name: str, tensors: dict[str, torch.Tensor], **config):
        target = tmp_path / name
        target.mkdir()
        save_file({key: value.contiguous() for key, value in tensors.items()}, target / WEIGHTS)
        (target / "config.json").write_text(json.dumps({"model_type": "llama"} | config))
        return target

    return write


def tensors(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """One parameter of each kind a checkpoint has; values from -1 to 1 in steps of 1/64."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        Q: (4, 4), UP: (6, 4), EMBEDDINGS: (8, 4), "model.layers.0.self_attn.q_proj.bias": (4,),
        "model.norm.weight": (4,), "vision.patch.weight": (4, 3, 2, 2, 2), "vision.scale": (),
    }  # fmt: skip
    found = {
        name: (torch.randint(-64, 65, shape, generator=generator) / 64).to(dtype)
        for name, shape in shapes.items()
    }
    return found | {"vision.position_ids": torch.arange(4)}


def test_scope_all_merges_every_parameter_with_entries(folder, tmp_path):
    base, one, two = (tensors(seed) for seed in range(3))
    experts = {"one": folder("one", one), "two": folder("two", two)}
    report = merge(
        folder("base", base), experts, tmp_path / "out", method="task_arithmetic", scope="all"
    )
    merged, kept = whole(tmp_path / "out"), {"vision.scale", "vision.position_ids"}
    for name, tensor in base.items():
        expected = tensor if name in kept else one[name] + two[name] - tensor
        assert torch.equal(merged[name], expected), name
    assert report.scope == "all" and report.parameters_kept == len(kept)


@pytest.mark.parametrize("method", METHODS)
def test_scope_all_suits_every_method(folder, tmp_path, method):
    names = ("one", "two")[: COUNTS.get(method, 2)]
    experts = {name: folder(name, tensors(seed)) for seed, name in enumerate(names, 1)}
    base, out = folder("base", tensors(0)), tmp_path / "out"
    merge(base, experts, out, method=method, scope="all")
    merged, mean = whole(out), (tensors(1)["model.norm.weight"] + tensors(2)["model.norm.weight"])
    assert all(torch.isfinite(tensor).all() for tensor in merged.values())
    on_matrices = ("tsv", "iso_c", "wudi", "optmerge", "swudi", "aswudi", "iso_cts", "dc_merge")
    if method in (*on_matrices, "ssam", "orthomerge", "weight_average"):
        assert torch.equal(merged["model.norm.weight"], mean / 2)


def test_scope_all_keeps_what_does_not_match_and_names_it(folder, tmp_path):
    one, two = tensors(1), tensors(2)
    one[EMBEDDINGS] = torch.ones(10, 4)
    del two["model.norm.weight"]
    experts = {"one": folder("one", one), "two": folder("two", two)}
    with pytest.warns() as notices:
        merge(
            folder("base", tensors(0)), experts, tmp_path / "out", method="task_arithmetic",
            scope="all",
        )  # fmt: skip
    assert [str(notice.message) for notice in notices] == [
        "expert one has 2 embeddings more than the base, which the merged model lacks: prompt it "
        "with the base's tokenizer",
        f"1 parameters keep the base's values: {EMBEDDINGS}: expert one has shape (10, 4) float32, "
        "the base shape (8, 4) float32",
        "1 parameters keep the base's values: model.norm.weight: expert two has no such parameter, "
        "the base shape (4,) float32",
    ]
    merged, base = whole(tmp_path / "out"), tensors(0)
    kept = {EMBEDDINGS, "model.norm.weight", "vision.scale", "vision.position_ids"}
    assert {name for name in base if torch.equal(merged[name], base[name])} == kept


@pytest.mark.parametrize("scope", ["linear", "all"])
def test_a_linear_layer_of_another_shape_is_refused_in_every_scope(folder, tmp_path, scope):
    other = tensors(1) | {Q: torch.ones(4, 8)}
    extra = tensors(1) | {Q.replace("0", "1"): torch.ones(4, 4)}
    for name, changed in (("shape", other), ("layer", extra)):
        expert = folder(name, changed)
        with pytest.raises(ValueError, match="1 parameters cannot be merged.*\n.*q_proj.weight"):
            merge(folder(f"base {name}", tensors(0)), {"e": expert}, tmp_path / "o", scope=scope)


def test_more_embeddings_are_a_notice_and_the_bases_are_kept(folder, tmp_path):
    one = tensors(1) | {EMBEDDINGS: torch.ones(10, 4)}
    with pytest.warns() as notices:
        merge(folder("base", tensors(0)), {"one": folder("one", one)}, tmp_path / "out")
    texts = [str(notice.message) for notice in notices]
    assert len(texts) == 2 and "expert one has 2 embeddings more" in texts[0]
    assert (
        f"1 parameters outside the merge differ in name or shape; the base's are kept ({EMBEDDINGS}"
        in texts[1]
    )
    assert torch.equal(whole(tmp_path / "out")[EMBEDDINGS], tensors(0)[EMBEDDINGS])


@pytest.mark.parametrize("method", ["task_arithmetic", "dare_task_arithmetic"])
@pytest.mark.parametrize("on_disk", ["base", "expert", "both"])
@pytest.mark.parametrize("head", [HEAD, "language_model.output.weight"])  # InternLM2's
@pytest.mark.parametrize("scope", ["linear", "all"])
def test_tied_embeddings_stay_tied(folder, tmp_path, on_disk, head, scope, method):
    """A head that is the embeddings' copy may be on disk or not: no notice, and still a copy."""
    base, one = tensors(0), tensors(1)
    if on_disk != "expert":
        base[head] = base[EMBEDDINGS].clone()
    if on_disk != "base":
        one[head] = one[EMBEDDINGS].clone()
    experts = {"one": folder("one", one, tie_word_embeddings=True)}
    merge(
        folder("base", base, tie_word_embeddings=True), experts, tmp_path / "out", scope=scope,
        method=method,
    )  # fmt: skip
    merged = whole(tmp_path / "out")
    assert merged.keys() == base.keys()
    assert torch.equal(merged[EMBEDDINGS], base[EMBEDDINGS]) == (scope == "linear")
    if on_disk != "expert":
        assert torch.equal(merged[head], merged[EMBEDDINGS])


def test_a_head_that_only_the_expert_unties_is_a_notice(folder, tmp_path):
    one = tensors(1) | {HEAD: torch.ones(8, 4)}
    expert = folder("one", one, tie_word_embeddings=False)
    base = folder("base", tensors(0), tie_word_embeddings=True)
    with pytest.warns(match=f"1 parameters outside the merge differ.*{HEAD}: expert one has shape"):
        merge(base, {"one": expert}, tmp_path / "out")


@pytest.mark.parametrize(("ours", "theirs"), list(permutations(BITS, 2)))
def test_any_two_dtypes_merge_exactly_with_a_notice(folder, tmp_path, ours, theirs):
    base, expert = tensors(0, getattr(torch, ours)), tensors(1, getattr(torch, theirs))
    base[UP] = base[UP] + torch.tensor(2**-9).to(base[UP].dtype)  # what some dtypes cannot hold
    expert[UP] = expert[UP] * torch.tensor(1.01).to(expert[UP].dtype)
    other = tensors(2, getattr(torch, ours))
    experts = {"one": folder("one", expert), "two": folder("two", other)}
    with pytest.warns() as notices:
        merge(
            folder("base", base), experts, tmp_path / "out", method="task_arithmetic",
            scaling_coefficient=0.5,
        )  # fmt: skip
    (notice,) = [str(notice.message) for notice in notices]
    assert notice.startswith(f"expert one is stored in {theirs}, ")
    if BITS[theirs] < BITS[ours]:
        noise = {"float32": "6e-06", "float16": "0.049", "bfloat16": "0.39"}[theirs]
        assert (
            f"rounding noise of up to {noise} % of each weight; give the base in {theirs}" in notice
        )
    else:
        assert f"finer than the base's {ours}" in notice
        assert ("dtype='float32' keeps them" in notice) == (ours != "float32")
    assert ("weights below 6e-05 are rounded" in notice) == (
        theirs == "float16" and ours == "bfloat16"
    )
    merged = whole(tmp_path / "out")
    for name, tensor in base.items():
        assert merged[name].dtype == tensor.dtype
        expected = tensor
        if name in (Q, UP):
            start = tensor.float()
            total = (expert[name].float() - start) + (other[name].float() - start)
            expected = (start + 0.5 * total).to(tensor.dtype)
        assert torch.equal(merged[name], expected), name


def test_rounding_noise_is_as_large_as_the_notice_says(folder, tmp_path):
    """An expert that learnt nothing but is saved coarser than its base has a task vector."""
    base = {Q: torch.linspace(1, 2, 4096).view(64, 64)}
    expert = folder("one", {Q: base[Q].bfloat16()})
    with pytest.warns(match="up to 0.39 % of each weight"):
        report = merge(folder("base", base), {"one": expert}, tmp_path / "out", method="ties")
    noise = (base[Q].bfloat16().float() - base[Q]).abs() / base[Q]
    assert 0.0035 < noise.max() <= 0.0039
    assert report.parameters[0]["expert_norms"]["one"] > 0
    same = folder("base in bfloat16", {Q: base[Q].bfloat16()})
    with pytest.raises(ValueError, match="one.* equals the base model in all 1 parameters"):
        merge(same, {"one": expert}, tmp_path / "remedy", method="ties")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
@pytest.mark.parametrize("owner", ["base", "expert"])
def test_quantised_weights_are_refused(folder, tmp_path, dtype, owner):
    folders = {name: tensors(0) for name in ("base", "expert")}
    folders[owner][Q] = torch.ones(4, 4).to(dtype)
    folders = {name: folder(name, content) for name, content in folders.items()}
    with pytest.raises(ValueError, match=rf"{Q}.*\n.*saved unquantised"):
        merge(folders["base"], {"one": folders["expert"]}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("scope", ["linear", "all"])
def test_an_expert_under_other_names_is_the_same_expert(tmp_path, scope):
    """Versions of transformers name LLaVA's language model, head and towers in two ways."""
    base, expert, out = build("llava"), build("llava"), tmp_path / "out"
    base.save_pretrained(tmp_path / "base")
    for parameter in expert.parameters():
        parameter.data.add_(0.01)
    expert.save_pretrained(tmp_path / "same")
    expert.save_pretrained(tmp_path / "other", save_original_format=False)
    ours, theirs = whole(tmp_path / "base"), whole(tmp_path / "other")
    assert not ours.keys() & theirs.keys() and len(ours) == len(theirs)
    with pytest.warns(match=f"expert ocr has other names for {len(ours)} parameters") as notices:
        merge(tmp_path / "base", {"ocr": tmp_path / "other"}, out, method="ties", scope=scope)
    assert len(notices) == 1
    merge(tmp_path / "base", {"ocr": tmp_path / "same"}, tmp_path / "o", method="ties", scope=scope)
    merged, expected = whole(out), whole(tmp_path / "o")
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], expected[name]) for name in expected)


def qwen2(folder, change=0.0, wrapped="{}"):
    """A tiny model's folder, its weights moved, their names as a wrapper of training has them."""
    model = build("qwen2")
    for parameter in model.parameters():
        parameter.data.add_(change)
    model.save_pretrained(folder)
    state = whole(folder)
    save_file({wrapped.format(n): t for n, t in state.items()}, folder / WEIGHTS, {"format": "pt"})
    return folder


@pytest.mark.parametrize("wrapped", ["module.{}", "_orig_mod.{}", "base_model.model.{}"])
def test_wrappers_of_training_change_nothing(tmp_path, wrapped):
    plain, out = qwen2(tmp_path / "base"), tmp_path / "out"
    expert = qwen2(tmp_path / "plain", 0.01)
    merge(plain, {"e": expert}, tmp_path / "expected", method="ties")
    with pytest.warns(match=rf"expert e has other names .*\({wrapped.format('')}\S+ for "):
        merge(plain, {"e": qwen2(tmp_path / "e", 0.01, wrapped)}, out, method="ties")
    merge(qwen2(tmp_path / "b", 0, wrapped), {"e": expert}, tmp_path / "from", method="ties")
    for folder in (out, tmp_path / "from"):
        merged, expected = whole(folder), whole(tmp_path / "expected")
        assert merged.keys() == expected.keys()
        assert all(torch.equal(merged[name], expected[name]) for name in expected)


def test_a_base_that_also_holds_an_adapter_gives_a_model_that_opens(tmp_path):
    base, expert, out = qwen2(tmp_path / "base"), qwen2(tmp_path / "expert", 0.01), tmp_path / "out"
    get_peft_model(build("qwen2"), LoraConfig(target_modules=["up_proj"])).save_pretrained(base)
    with pytest.warns(match=f"{base} holds an adapter .* beside whole weights, which are taken"):
        merge(base, {"e": expert}, out, method="task_arithmetic", scope="all")
    model, info = Qwen2ForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()) and not (out / "adapter_config.json").exists()
    torch.testing.assert_close(model.state_dict()[Q], whole(expert)[Q])


@pytest.mark.parametrize("content", [None, "", "{}"])
def test_a_base_without_a_config_is_refused_or_named(tmp_path, content):
    base, expert, out = qwen2(tmp_path / "base"), qwen2(tmp_path / "expert", 0.01), tmp_path / "out"
    (expert / "config.json").unlink()  # an expert's is not needed
    merge(base, {"e": expert}, tmp_path / "whole", method="ties")
    (base / "config.json").unlink()
    if content is not None:
        (base / "config.json").write_text(content)
    problem = (
        r"config.json: an empty file; d" if content == "" else r"config.json is missing or emp"
    )
    with pytest.raises(ValueError, match=f"{base}.*{problem}"):
        merge(base, {"e": expert}, out, method="ties")
    assert not out.exists()
    if content != "":
        with pytest.warns(match=f"{base}: config.json is missing .*the merged model does not open"):
            merge(base, {"e": expert}, out, method="ties", family="qwen2")
        assert (out / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
