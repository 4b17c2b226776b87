"""A mixture's matrices in every layout that transformers saves: each becomes the base's."""

import json
from itertools import permutations

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from optmerge_core import merge, open_checkpoint
from optmerge_core.checkpoints.layouts import Relaid, as_laid_out
from optmerge_core.checkpoints.open import open_expert
from optmerge_core.checkpoints.weights import InMemory

TEXT = {
    "vocab_size": 16, "hidden_size": 16, "intermediate_size": 12, "moe_intermediate_size": 6,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
    "num_experts_per_tok": 2, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
DEEPSEEK = {
    "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
    "n_routed_experts": 3, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4, "v_head_dim": 4,
}  # fmt: skip
CLASSES = {
    "MixtralForCausalLM": {"num_local_experts": 3},
    "Qwen2MoeForCausalLM": {"num_experts": 3, "shared_expert_intermediate_size": 8},
    "Qwen3MoeForCausalLM": {"num_experts": 3, "head_dim": 8},
    "OlmoeForCausalLM": {"num_experts": 3},
    "DeepseekV3ForCausalLM": DEEPSEEK,
}
RENAMED = {  # other words alone, or no gates
    "GraniteMoeForCausalLM": {"num_local_experts": 3},
    "Ernie4_5_MoeForCausalLM": {"moe_num_experts": 3, "moe_layer_start_index": 0, "moe_k": 1},
    "NemotronHForCausalLM": {
        "n_routed_experts": 3, "layers_block_type": ["moe", "attention"], "head_dim": 8,
        "moe_shared_expert_intermediate_size": 8, "num_hidden_layers": 2,
    },
}  # fmt: skip
LAYOUTS = ("one by one", "fused", "turned")
DOWN, GATE_UP = (f"model.layers.0.mlp.experts.{x}_proj" for x in ("down", "gate_up"))


def make(name, seed):
    model_class = getattr(transformers, name)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return model_class(model_class.config_class(**TEXT | (CLASSES | RENAMED)[name]))


def save(model, folder, layout):
    """As transformers saves it; turned: fused with outputs last, as published Qwen3-VL-MoE is."""
    model.save_pretrained(folder, save_original_format=layout == "one by one")
    if layout == "turned":
        tensors = load_file(folder / "model.safetensors")
        for name in (DOWN, GATE_UP):
            tensors[name] = tensors[name].mT.contiguous()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("name", "theirs", "ours"),
    [(name, *pair) for name in CLASSES for pair in permutations(LAYOUTS, 2)]
    + [(name, *pair) for name in RENAMED for pair in permutations(LAYOUTS[:2])],
)
def test_an_expert_in_any_layout_has_the_bases(tmp_path, name, theirs, ours):
    expert = make(name, 1)
    base = open_checkpoint(save(make(name, 0), tmp_path / "base", ours))
    expected = open_checkpoint(save(expert, tmp_path / "expected", ours))
    relaid = as_laid_out(open_expert(save(expert, tmp_path / "expert", theirs), base), base)
    assert set(relaid) == set(expected) == set(base)
    for parameter in expected:
        tensor = relaid[parameter]
        assert torch.equal(tensor, expected[parameter]) and tensor.is_contiguous()
        assert relaid.shape(parameter) == tensor.shape and relaid.dtype(parameter) == tensor.dtype
    assert relaid.folder == tmp_path / "expert" and relaid.file_sizes()
    if theirs == "fused":  # a model in memory has this layout
        in_memory = as_laid_out(open_expert(expert, base), base)
        assert all(torch.equal(in_memory[x], expected[x]) for x in expected)


@pytest.mark.filterwarnings("ignore:model type .* has no rule of its own")
@pytest.mark.filterwarnings("ignore:expert b has other names")
@pytest.mark.parametrize("scope", ["linear", "all"])
@pytest.mark.parametrize(("theirs", "ours"), list(permutations(LAYOUTS[:2])))
@pytest.mark.parametrize("name", ["MixtralForCausalLM", "Qwen3MoeForCausalLM"])
def test_a_merge_of_two_layouts_is_that_of_one(tmp_path, name, theirs, ours, scope):
    base = save(make(name, 0), tmp_path / "base", ours)
    experts = {"a": make(name, 1), "b": make(name, 2)}
    same = {x: save(model, tmp_path / x, ours) for x, model in experts.items()}
    mixed = same | {"b": save(experts["b"], tmp_path / "other", theirs)}
    settings = {"method": "task_arithmetic", "scope": scope}
    merge(base, same, tmp_path / "same", **settings)
    merge(base, mixed, tmp_path / "mixed", **settings)
    one, other = (tmp_path / x / "model.safetensors" for x in ("same", "mixed"))
    assert one.read_bytes() == other.read_bytes()
    model = type(experts["a"]).from_pretrained(tmp_path / "mixed")
    if scope == "all" or ours == "one by one":
        start = make(name, 0).state_dict()[GATE_UP]
        total = sum(expert.state_dict()[GATE_UP] - start for expert in experts.values())
        torch.testing.assert_close(model.state_dict()[GATE_UP], start + total)


def test_a_published_qwen3_vl_moe_merges_with_what_transformers_5_saved_of_it(tmp_path):
    """Published files have outputs last; transformers reads both and saves the other."""
    text = TEXT | {"num_experts": 3, "head_dim": 8}
    text |= {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}}
    vision = {
        "depth": 1, "hidden_size": 16, "out_hidden_size": 16, "num_heads": 2, "patch_size": 4,
        "intermediate_size": 12, "deepstack_visual_indexes": [0], "num_position_embeddings": 16,
    }  # fmt: skip
    config = transformers.Qwen3VLMoeConfig(text_config=text, vision_config=vision)
    models = {}
    with torch.random.fork_rng():
        for seed, name in enumerate(("base", "a", "b")):
            torch.manual_seed(seed)
            models[name] = transformers.Qwen3VLMoeForConditionalGeneration(config)
            models[name].save_pretrained(tmp_path / name)
    path = tmp_path / "base" / "model.safetensors"
    published = {x: t.mT.contiguous() if t.ndim == 3 else t for x, t in load_file(path).items()}
    save_file(published, path, metadata={"format": "pt"})
    experts = {name: tmp_path / name for name in "ab"}
    merge(tmp_path / "base", experts, tmp_path / "out", method="task_arithmetic", scope="all")
    merged = type(models["a"]).from_pretrained(tmp_path / "out").state_dict()
    start, *others = (models[name].state_dict() for name in ("base", "a", "b"))
    for name, tensor in merged.items():
        total = sum(other[name] - start[name] for other in others)
        torch.testing.assert_close(tensor, start[name] + total, msg=name)


def tensors(*names, shape=(4, 3)):
    return {name: torch.randn(shape) for name in names}


SINGLE = "model.layers.0.mlp.experts.{}.{}_proj.weight"


def singles(experts):
    """(4, 3): inner 4, outer 3."""
    found = {}
    for number in range(experts):
        found |= tensors(*(SINGLE.format(number, kind) for kind in ("gate", "up")))
        found |= tensors(SINGLE.format(number, "down"), shape=(3, 4))
    return found


def test_what_does_not_fit_stays_as_it_is_and_is_refused(tmp_path):
    """Another number of experts, another size, or one matrix missing: the merge names it."""
    base = singles(3)
    save_file(base, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_moe"}))
    fewer = {GATE_UP: torch.randn(2, 8, 3), DOWN: torch.randn(2, 3, 4)}
    larger = {GATE_UP: torch.randn(3, 10, 3), DOWN: torch.randn(3, 3, 5)}
    for number, expert in enumerate((fewer, larger)):
        assert set(as_laid_out(InMemory(expert), InMemory(base))) == set(expert)
        with pytest.raises(ValueError, match="11 parameters cannot be merged.*\n.*down_proj"):
            merge(tmp_path, {"e": expert}, tmp_path.with_name(f"out{number}"))
    fused = InMemory({GATE_UP: torch.randn(3, 8, 3), DOWN: torch.randn(3, 3, 4)})
    for expert in (singles(2), singles(4), base | {SINGLE.format(1, "up"): torch.randn(4, 5)}):
        relaid = as_laid_out(InMemory(expert), fused)
        assert GATE_UP not in relaid
    assert as_laid_out(fused, fused) is fused


def test_of_a_stream_a_fused_tensor_comes_once(tmp_path):
    class Stream(InMemory):
        reads = []

        def __getitem__(self, name):
            self.reads.append(name)
            return super().__getitem__(name)

        def streamed(self, names):
            return [(self, list(names))]

    stream = Stream({GATE_UP: torch.randn(3, 8, 3), DOWN: torch.randn(3, 3, 4)})
    relaid = as_laid_out(stream, InMemory(singles(3)))
    assert isinstance(relaid, Relaid)
    for name in sorted(relaid):
        assert relaid[name].shape == relaid.shape(name)
    assert sorted(stream.reads) == [DOWN, GATE_UP]
    assert relaid.streamed(list(relaid)) == [(stream, [GATE_UP, DOWN])]
