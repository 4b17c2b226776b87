"""Mixtures of experts: every matrix of a tensor that holds many merges as one of its own would."""

import json
from itertools import product
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from optmerge_core import METHODS, merge, open_checkpoint
from optmerge_core.checkpoints.layouts import INPUTS_FIRST, as_laid_out, inputs_first
from optmerge_core.checkpoints.names import routers
from optmerge_core.checkpoints.weights import InMemory
from optmerge_core.merging.families import mergeable
from optmerge_core.merging.loop import merge_tensors
from optmerge_core.merging.merge import join, merge_part
from optmerge_core.merging.plan import load_plan, plan_merge
from optmerge_core.methods import BASED, DRAWN, EXPERTS
from optmerge_core.study.diagnosis import diagnose
from optmerge_core.task_vectors.stack import TaskVectors, derive_seed

LAYER = "model.language_model.layers.0"
Q, ROUTER = f"{LAYER}.self_attn.q_proj.weight", f"{LAYER}.mlp.gate.weight"
GATE_UP, DOWN = (f"{LAYER}.mlp.experts.{x}_proj" for x in ("gate_up", "down"))
INNER = {"oblong": 5, "square": 4}
"""Of outer 8: where inner is 4, gates and ups together are as many as what goes in."""
OPTIONS = {
    "ties": {"density": 0.4}, "wudi": {"steps": 3}, "optmerge": {"steps": 3},
    "swudi": {"rank_ratio": 0.5},
}  # fmt: skip


def tensors(seed, inner=5, experts=3):
    """A layer with its mixture as outputs × inputs."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {Q: (8, 8), ROUTER: (experts, 8)}
    shapes |= {GATE_UP: (experts, 2 * inner, 8), DOWN: (experts, 8, inner)}
    return {n: torch.randn(shape, generator=generator) for n, shape in shapes.items()}


def turned(state):
    return {n: x.mT.contiguous() if x.ndim == 3 else x for n, x in state.items()}


@pytest.fixture
def folder(tmp_path):
    def write(name, state, model_type="qwen3_vl_moe", **config):
        path = tmp_path / name
        path.mkdir()
        save_file(state, path / "model.safetensors", {"format": "pt"})
        (path / "config.json").write_text(json.dumps({"model_type": model_type} | config))
        return path

    return write


def one_by_one(method, base, experts, seed=0, **options):
    """Each matrix by the method, called on it alone: name -> merged parameter."""
    merged = {}
    for name, tensor in base.items():
        stack = torch.stack([expert[name] - tensor for expert in experts.values()])
        matrices = [(stack, ())]
        if tensor.ndim == 3:
            matrices = [(stack[:, i], (str(i),)) for i in range(len(tensor))]
        changes = []
        for matrix, number in matrices:
            drawn = {}
            if method in DRAWN:
                seeds = [derive_seed(seed, name, expert, *number) for expert in experts]
                drawn["generator"] = [torch.Generator().manual_seed(x) for x in seeds]
            if method in BASED:
                drawn["base"] = tensor[int(number[0])] if number else tensor
            changes.append(METHODS[method](matrix, **options, **drawn))
        merged[name] = tensor + (torch.stack(changes) if tensor.ndim == 3 else changes[0])
    return merged


@pytest.mark.filterwarnings("ignore:.* has square matrices as inputs")
@pytest.mark.parametrize("shape", INNER)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_merges_matrix_by_matrix_however_they_lie(folder, tmp_path, method, shape):
    states = [tensors(seed, INNER[shape]) for seed in range(3)]
    names = "ab"[: EXPERTS.get(method, 2)]
    own = dict(zip(names, states[1:], strict=False))
    expected = one_by_one(method, states[0], own, **OPTIONS.get(method, {}))
    settings = {"method": method, "method_options": OPTIONS.get(method, {})}
    for number, (ours, theirs) in enumerate(product([False, True], repeat=2)):
        ways = zip(states, (ours, not theirs, theirs), strict=True)
        base, a, b = (turned(state) if way else state for state, way in ways)
        out = tmp_path / f"out{number}"
        experts = dict(zip(names, (a, b), strict=False))
        report = merge(folder(f"base{number}", base), experts, out, **settings)
        merged = load_file(out / "model.safetensors")
        # transformers 5 turns what has not the shape it expects
        loaded = {n: x if x.shape == expected[n].shape else x.mT for n, x in merged.items()}
        torch.testing.assert_close(loaded, expected)
        assert {record["name"]: tuple(record["shape"]) for record in report.parameters} == {
            name: tuple(tensor.shape) for name, tensor in merged.items()
        }
        if ours and shape == "oblong":
            assert merged[DOWN].shape == base[DOWN].shape  # the base's own layout is kept
    record = next(x for x in report.parameters if x["name"] == DOWN)
    last = states[len(names)][DOWN] - states[0][DOWN]
    assert record["expert_norms"][names[-1]] == pytest.approx(last.norm())
    assert record["base_norm"] == pytest.approx(states[0][DOWN].norm())
    assert record["merged_norm"] == pytest.approx((expected[DOWN] - states[0][DOWN]).norm())


def test_square_matrices_of_a_base_that_transformers_would_not_turn_are_named(folder, tmp_path):
    base, one = turned(tensors(0, 4)), tensors(1, 4)
    place = folder("base", base)
    with pytest.warns(match=f"{place}: {GATE_UP} has square matrices as inputs × outputs, which"):
        merge(place, {"one": one}, tmp_path / "out", method="task_arithmetic")
    torch.testing.assert_close(load_file(tmp_path / "out" / "model.safetensors"), one)
    llama = folder("llama", base, "llama4")  # a class that holds them so
    merge(llama, {"one": turned(one)}, tmp_path / "kept", method="task_arithmetic")
    torch.testing.assert_close(load_file(tmp_path / "kept" / "model.safetensors"), turned(one))


def test_where_nothing_tells_how_matrices_lie_a_merge_is_refused(folder, tmp_path):
    alone = {n: x for n, x in tensors(0, 4).items() if n != DOWN}
    base = folder("base", alone)
    with pytest.raises(ValueError, match=f"{base}: nothing tells .* {GATE_UP} .*give all of"):
        merge(base, {"a": alone}, tmp_path / "out")
    whole = InMemory(tensors(0, 4), {"model_type": "qwen3_vl_moe"})
    with pytest.raises(ValueError, match=f"a model in memory: nothing tells .* {GATE_UP} are"):
        as_laid_out(InMemory(alone), whole)
    assert inputs_first(InMemory(alone, {"text_config": {"model_type": "llama4_text"}})) == {
        GATE_UP
    }
    assert inputs_first(InMemory(alone, {"model_type": "glm4v_moe"})) == set()
    nemo = "model.layers.0.mixer.experts.down_projs"
    assert inputs_first(InMemory({nemo: torch.ones(2, 3, 4)})) == {nemo}


def test_the_classes_that_hold_inputs_first_are_those_of_transformers():
    models = Path(transformers.__file__).parent / "models"
    turning = {
        path.parent.name
        for path in models.glob("*/modeling_*.py")
        if "is_transposed=True" in path.read_text(encoding="utf-8")
    }
    assert {name.removesuffix("_text") for name in INPUTS_FIRST} == turning | {"llama4"}


@pytest.mark.parametrize("method", ["ties", "dare_ties"])
def test_trimming_over_the_model_counts_every_matrix(folder, tmp_path, method):
    base, a = tensors(0), tensors(1)
    options = {"density": 0.3, "drop_rate": 0.5} if method == "dare_ties" else {"density": 0.3}
    merge(
        folder("base", base), {"a": a}, tmp_path / "out", method=method, trim="model",
        method_options=options,
    )  # fmt: skip
    left = options | {"density": 1.0}  # what is dropped, and nothing trimmed
    changes = {n: x - base[n] for n, x in one_by_one(method, base, {"a": a}, **left).items()}
    entries = torch.cat([x.flatten() for x in changes.values()]).abs()
    limit = entries.sort().values[int(0.7 * len(entries)) - 1]
    expected = {n: base[n] + x * (x.abs() >= limit - 1e-6) for n, x in changes.items()}
    torch.testing.assert_close(load_file(tmp_path / "out" / "model.safetensors"), expected)


def test_parts_and_memory_merge_the_same_and_hold_one_matrix_at_a_time(
    folder, tmp_path, monkeypatch
):
    base, experts = turned(tensors(0)), {"a": tensors(1), "b": turned(tensors(2))}
    place = folder("base", base)
    experts = {x: folder(x, state) for x, state in experts.items()}
    settings = {"method": "swudi", "method_options": {"rank_ratio": 0.5}}
    shapes, own = set(), TaskVectors.stack  # what is ever in float32

    def watched(self, name, tensor, *rest):
        shapes.add(tuple(tensor.shape))
        return own(self, name, tensor, *rest)

    monkeypatch.setattr(TaskVectors, "stack", watched)
    merge(place, experts, tmp_path / "whole", **settings)
    plan = plan_merge(place, experts, tmp_path / "parts", max_part_size=1, **settings)
    again = load_plan(plan.save(tmp_path / "plan.json"))
    assert len(again.parts) == len(base)
    for number in range(len(again.parts)):
        merge_part(again, number)
    join(again)
    whole, parts = (tmp_path / x / "model.safetensors" for x in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()
    opened = {x: as_laid_out(open_checkpoint(experts[x]), open_checkpoint(place)) for x in experts}
    change = merge_tensors(open_checkpoint(place), opened, list(base), **settings)
    torch.testing.assert_close({n: base[n] + change[n] for n in base}, load_file(whole))
    assert shapes == {(8, 8), (3, 8), (10, 8), (8, 5)}


def test_what_no_adapter_changes_is_not_merged(folder, tmp_path):
    """A mixture's tensors would take most of the time, for zeros."""
    base = folder("base", tensors(0))
    factors = {f"base_model.model.{Q.removesuffix('weight')}lora_{x}.weight": shape for x, shape in
               (("A", torch.ones(2, 8)), ("B", torch.ones(8, 2)))}  # fmt: skip
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file(factors, adapter / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    report = merge(base, {"a": adapter}, tmp_path / "out", method="task_arithmetic")
    assert [record["name"] for record in report.parameters] == [ROUTER, Q]
    merged, start = load_file(tmp_path / "out" / "model.safetensors"), tensors(0)
    assert all(torch.equal(merged[n], start[n]) for n in (GATE_UP, DOWN, ROUTER))
    torch.testing.assert_close(merged[Q], start[Q] + 2)


def test_a_router_merges_or_is_the_bases(folder, tmp_path):
    base, one = folder("base", tensors(0)), tensors(1)
    for router, scope in product(("merge", "base"), ("linear", "all")):
        out = tmp_path / f"{router} {scope}"
        settings = {"method": "task_arithmetic", "router": router, "scope": scope}
        report = merge(base, {"one": one}, out, **settings)
        expected = one | ({ROUTER: tensors(0)[ROUTER]} if router == "base" else {})
        torch.testing.assert_close(load_file(out / "model.safetensors"), expected)
        assert json.loads((out / "merge_report.json").read_text())["router"] == router
        assert report.recipe().get("router", "merge") == router
    with pytest.raises(ValueError, match="router 'expert': give 'merge' or 'base'"):
        merge(base, {"one": one}, tmp_path / "out", router="expert")


def test_routers_are_what_stands_beside_the_experts():
    names = {
        "model.layers.0.mlp.experts.0.up_proj.weight": False,
        "model.layers.0.mlp.gate.weight": True,
        "model.layers.0.mlp.gate.e_score_correction_bias": True,
        "model.layers.0.mlp.shared_expert_gate.weight": False,
        "model.layers.1.mlp.gate.weight": False,  # no mixture
        "language_model.model.layers.0.feed_forward.experts.gate_up_proj": False,
        "language_model.model.layers.0.feed_forward.router.weight": True,  # Llama-4
        "model.language_model.layers.2.experts.down_proj": False,
        "model.language_model.layers.2.router.proj.weight": True,  # Gemma-4
        "model.language_model.layers.2.mlp.gate_proj.weight": False,
        "model.layers.3.block_sparse_moe.input_linear.weight": False,
        "model.layers.3.block_sparse_moe.router.layer.weight": True,  # GraniteMoe
        "model.layers.4.moe.gate_proj.weight": False,
        "model.layers.4.moe.gate.weight": True,  # Step-3
    }
    assert routers(names) == {name for name, is_router in names.items() if is_router}


def test_a_diagnosis_measures_a_mixture_as_one_parameter():
    base, experts = turned(tensors(0)), {"a": turned(tensors(1)), "b": turned(tensors(2))}
    found = diagnose(base, experts, list(base))
    rows = found.parameters.set_index(["parameter", "expert"])
    for name, (x, expert) in product(base, experts.items()):
        row = rows.loc[(name, x)]
        assert row["norm"] == pytest.approx((expert[name] - base[name]).norm().item())
        assert row["size"] == base[name].numel()
    flat = [torch.cat([(e[n] - base[n]).flatten() for n in base]) for e in experts.values()]
    cosine = torch.nn.functional.cosine_similarity(*flat, dim=0)
    assert found.pairs["cosine"].item() == pytest.approx(cosine.item(), abs=1e-6)


def test_tensors_of_every_family_that_stores_them_so():
    """Names on disk, of published checkpoints and of what transformers 5 saves."""
    shapes = {
        "model.language_model.layers.0.mlp.experts.gate_up_proj": (2, 6, 4),
        "language_model.model.layers.0.feed_forward.experts.down_proj": (2, 3, 4),
        "language_model.model.layers.0.mlp.experts.fc1.weight": (2, 4, 6),
        "model.layers.0.block_sparse_moe.output_linear.weight": (2, 4, 3),
        "model.layers.0.moe.up_proj.weight": (2, 3, 4),
        "model.llm.layers.0.mlp.experts.w13_weight": (2, 6, 4),
        "backbone.layers.0.mixer.experts.down_projs": (2, 3, 4),
    }
    kept = {
        "model.layers.0.conv.conv.weight": (4, 1, 3),
        "model.layers.0.mlp.experts.gate_up_proj_bias": (2, 6),
        "vision_tower.layers.0.mlp.experts.down_proj": (2, 4, 3),
        "model.layers.0.mlp.experts.down_proj": (0, 4, 3),
    }
    with pytest.warns() as notices:
        assert mergeable(shapes | kept, "mystery") == list(shapes)
    texts = [str(notice.message) for notice in notices]
    assert len(texts) == 2 and "has no rule" in texts[0]
    assert "2 tensors of a mixture of experts have no known name" in texts[1]


TEXT = {
    "vocab_size": 32, "hidden_size": 8, "intermediate_size": 6, "moe_intermediate_size": 6,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4,
    "num_experts": 3, "num_experts_per_tok": 2, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
VISION = {
    "hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 8, "patch_size": 4,
}  # fmt: skip
QWEN = {
    "depth": 1, "hidden_size": 8, "out_hidden_size": 8, "num_heads": 2, "patch_size": 4,
    "intermediate_size": 6, "num_position_embeddings": 16,
}  # fmt: skip
CLASSES = {
    "Qwen3VLMoe": {"text_config": TEXT, "vision_config": QWEN | {"deepstack_visual_indexes": [0]}},
    "Qwen3_5Moe": {
        "text_config": TEXT | {
            "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"],
            "shared_expert_intermediate_size": 6, "linear_num_key_heads": 2,
            "linear_num_value_heads": 2, "linear_key_head_dim": 4, "linear_value_head_dim": 4,
        },
        "vision_config": QWEN,
    },
    "Llama4": {
        "text_config": TEXT | {"num_local_experts": 3, "intermediate_size_mlp": 6},
        "vision_config": VISION
        | dict.fromkeys(("vision_output_dim", "projector_input_dim", "projector_output_dim"), 8),
    },
    "Aria": {
        "text_config": TEXT | {"moe_num_experts": 3, "moe_num_shared_experts": 1},
        "vision_config": VISION,
        "projector_patch_to_query_dict": {4: 2},
    },
    "Gemma4": {
        "text_config": TEXT | {
            "enable_moe_block": True, "top_k_experts": 2, "hidden_size_per_layer_input": 0,
            "layer_types": ["full_attention"], "num_kv_shared_layers": 0, "global_head_dim": 4,
        },
        "vision_config": VISION | {"head_dim": 4, "num_key_value_heads": 2},
        "audio_config": None,
    },
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:model type .* has no rule of its own")
@pytest.mark.filterwarnings("ignore:expert b has other names")
@pytest.mark.parametrize(
    ("name", "published"),
    [(name, "neither") for name in CLASSES] + [("Qwen3VLMoe", x) for x in ("base", "expert")],
)
def test_a_real_class_opens_with_its_matrices_merged_one_by_one(tmp_path, name, published):
    cls = getattr(transformers, f"{name}ForConditionalGeneration")
    models = {}
    with torch.random.fork_rng():
        for seed, x in enumerate(("base", "a", "b")):
            torch.manual_seed(seed)
            models[x] = cls(cls.config_class(**CLASSES[name]))
            for parameter in models[x].parameters():
                torch.nn.init.normal_(parameter)
            if x != "b":  # which stays in memory
                fused = name == "Qwen3_5Moe"  # else it is saved expert by expert
                models[x].save_pretrained(tmp_path / x, save_original_format=not fused)
    if published != "neither":
        path = tmp_path / {"base": "base", "expert": "a"}[published] / "model.safetensors"
        save_file(turned(load_file(path)), path, {"format": "pt"})
    options = {"rank_ratio": 0.5}
    merge(
        tmp_path / "base", {"a": tmp_path / "a", "b": models["b"]}, tmp_path / "out",
        method="swudi", method_options=options,
    )  # fmt: skip

    decoder = models["base"].get_decoder()
    front = next(n for n, x in models["base"].named_modules() if x is decoder)
    start, *others = (model.state_dict() for model in models.values())
    way = next(x.shape[1] == 8 for n, x in start.items() if n.endswith("experts.down_proj"))
    assert way == (name not in ("Llama4", "Aria"))  # outputs are 8, inputs 6
    stacks = 0
    for n, tensor in cls.from_pretrained(tmp_path / "out").state_dict().items():
        expected, stack = start[n], torch.stack([other[n] - start[n] for other in others])
        in_layer = n.startswith(front) and ".layers." in n
        if in_layer and tensor.ndim == 2:
            expected = start[n] + METHODS["swudi"](stack, **options)
        elif in_layer and ".experts." in n:
            stacks += 1
            rows = [x if way else x.mT for x in stack.unbind(1)]
            changes = torch.stack([METHODS["swudi"](x, **options) for x in rows])
            expected = start[n] + (changes if way else changes.mT)
        torch.testing.assert_close(tensor, expected, msg=lambda text, n=n: f"{n}: {text}")
    assert stacks == 2 * CLASSES[name]["text_config"]["num_hidden_layers"]
