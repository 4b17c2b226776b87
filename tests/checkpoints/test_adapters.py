"""LoRA adapters: read as PEFT reads them, merged as `merge` merges them, refused when unclear."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from optmerge_core import METHODS, merge, merge_adapters, open_checkpoint
from optmerge_core.__main__ import main
from optmerge_core.checkpoints.adapters import Adapter, Factors, parameter_of
from optmerge_core.checkpoints.formats import CheckpointError
from optmerge_core.checkpoints.open import open_expert
from optmerge_core.checkpoints.weights import as_weights
from optmerge_core.merging.families import mergeable
from optmerge_core.merging.loop import merge_tensors
from optmerge_core.merging.merge_adapters import merge_cores, merge_factors

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def tiny_model():
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=40,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=36,
        tie_word_embeddings=True,
    )
    return Qwen2ForCausalLM(config)


def make_adapter(folder, seed, **settings):
    config = LoraConfig(**({"r": 3, "lora_alpha": 5, "target_modules": LINEAR} | settings))
    model = get_peft_model(tiny_model(), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    root = tmp_path_factory.mktemp("family")
    tiny_model().save_pretrained(root / "base")
    settings = [{}, {"r": 2, "use_rslora": True}, {"alpha_pattern": {"layers.1.mlp.up_proj": 9}}]
    experts = {
        f"e{i}": make_adapter(root / f"e{i}", i, **options) for i, options in enumerate(settings)
    }
    return root / "base", experts


@pytest.mark.parametrize("expert", ["e0", "e1", "e2"])
def test_adapter_equals_peft_s_own_merge(family, expert):
    base, experts = family
    merged = PeftModel.from_pretrained(tiny_model(), experts[expert]).merge_and_unload()
    adapter = open_expert(experts[expert], open_checkpoint(base))
    assert isinstance(adapter, Adapter) and len(adapter.modules) == 14
    for name, tensor in merged.state_dict().items():
        if name != "lm_head.weight":
            torch.testing.assert_close(adapter[name], tensor, atol=1e-6, rtol=1e-5)


def test_task_vector_is_the_scaled_product(family):
    base, experts = family
    adapter = open_expert(experts["e1"], open_checkpoint(base))
    stored = load_file(experts["e1"] / "adapter_model.safetensors")
    path = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    product = stored[f"{path}B.weight"] @ stored[f"{path}A.weight"]
    name = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(adapter.task_vector(name), 5 / 2**0.5 * product)
    assert adapter.task_vector("model.norm.weight").count_nonzero() == 0


def test_merge_takes_adapters(family, tmp_path):
    base, experts = family
    report = merge(base, experts, tmp_path / "out", method="task_arithmetic")
    merged, weights = open_checkpoint(tmp_path / "out"), open_checkpoint(base)
    opened = [open_expert(folder, weights) for folder in experts.values()]
    for name in weights:
        expected = weights[name] + sum(e.task_vector(name) for e in opened)
        torch.testing.assert_close(merged[name], expected)
    assert "adapter_model.safetensors" in report.experts["e0"]["sha256"]
    Qwen2ForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("weight_average", {}),
        ("task_arithmetic", {}),
        ("tsv", {}),
        ("iso_c", {}),
        ("swudi", {}),
        ("wudi", {"optimizer": "sgd", "learning_rate": 1e-2}),
        ("optmerge", {"preset": "lora", "learning_rate": 1e-2}),
        ("optmerge", {"preset": "lora", "learning_rate": 0.2, "learning_rate_unit": "rms"}),
        ("wudi", {"optimizer": "sgd", "learning_rate_unit": "rms"}),
        ("optmerge", {"preset": "lora", "learning_rate_unit": "rms"}),
        ("optmerge", {"preset": "lora", "rank_ratio": 0.05, "learning_rate": 1e-2}),
        ("optmerge", {"preset": "modality"}),
        ("optmerge", {"preset": "modality", "rank_ratio": None}),
        ("optmerge", {"preset": "lora", "optimizer": "ridge", "shrink": None}),
        ("wudi", {"optimizer": "ridge"}),
        ("optmerge", {"preset": "lora", "optimizer": "ridge", "shrink": 0.3}),
        ("optmerge", {"optimizer": "sgd", "preset": "full", "learning_rate": 1e-2}),
    ],
)
def test_merged_adapter_equals_the_dense_merge(family, tmp_path, method, options):
    base, experts = family
    weights = open_checkpoint(base)
    opened = {name: open_expert(folder, weights) for name, folder in experts.items()}
    names = mergeable(weights.shapes(), "qwen2")
    dense = merge_tensors(weights, opened, names, method=method, method_options=options)
    folder = merge_adapters(
        experts, tmp_path / "out", method=method, method_options=options, scaling_coefficient=0.7
    )
    merged = open_expert(folder, weights)
    for name in names:
        error = (merged.task_vector(name) - 0.7 * dense[name]).norm() / dense[name].norm()
        assert error < 1e-5, (name, error)


def test_inspect_takes_adapters(family, tmp_path, capsys):
    base, experts = family
    models = [{"model": str(folder), "name": name} for name, folder in experts.items()]
    recipe = tmp_path / "lora.yaml"
    recipe.write_text(json.dumps({"base_model": str(base), "models": models}))
    assert main(["inspect", str(recipe)]) == 0
    assert "14 parameters merge" in capsys.readouterr().out


def test_merged_adapter_loads_with_peft(family, tmp_path):
    base, experts = family
    folder = merge_adapters(experts, tmp_path / "out", method="weight_average")
    model = PeftModel.from_pretrained(tiny_model(), folder).merge_and_unload().state_dict()
    merge(base, experts, tmp_path / "dense", method="weight_average")
    dense = open_checkpoint(tmp_path / "dense")
    for name in dense:
        torch.testing.assert_close(model[name], dense[name], atol=1e-6, rtol=1e-5)


def test_merged_rank_is_at_most_the_sum_of_ranks(family, tmp_path):
    _, experts = family
    folder = merge_adapters(experts, tmp_path / "out", method="task_arithmetic")
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["r"] == settings["lora_alpha"] == 3 + 2 + 3


def test_one_adapter_comes_back(family, tmp_path):
    _, experts = family
    folder = merge_adapters({"e0": experts["e0"]}, tmp_path / "out", method="weight_average")
    before, after = (Factors(open_checkpoint(f, adapter=True)) for f in (experts["e0"], folder))
    for module in before:
        (b, a), (d, c) = before[module], after[module]
        torch.testing.assert_close(d @ c, b @ a, atol=1e-6, rtol=1e-5)


def test_a_layer_that_only_some_experts_adapt(tmp_path):
    folders = {
        "attention": make_adapter(tmp_path / "a", 1, target_modules=["q_proj", "v_proj"]),
        "mlp": make_adapter(tmp_path / "b", 2, target_modules=["v_proj", "up_proj"]),
    }
    tiny_model().save_pretrained(tmp_path / "base")
    weights = open_checkpoint(tmp_path / "base")
    merged = open_expert(
        merge_adapters(folders, tmp_path / "out", method="weight_average"), weights
    )
    parts = [open_expert(folder, weights) for folder in folders.values()]
    for name in mergeable(weights.shapes(), "qwen2"):
        mean = sum(part.task_vector(name) for part in parts) / 2
        torch.testing.assert_close(merged.task_vector(name), mean, atol=1e-6, rtol=1e-5)


def test_cores_of_any_shape_give_what_the_whole_matrices_give():
    generator = torch.Generator().manual_seed(3)
    for rows, columns, ranks in ((9, 40, (4, 4, 4)), (40, 9, (2, 5, 1)), (12, 12, (6, 6, 6))):
        pairs = [
            (
                torch.randn(rows, r, generator=generator),
                torch.randn(r, columns, generator=generator),
            )
            for r in ranks
        ]
        stack = torch.stack([(b @ a).double() for b, a in pairs])
        for method in ("tsv", "iso_c", "swudi"):
            b, a = merge_factors(pairs, method, {}, 1.0, (rows, columns))
            expected = METHODS[method](stack).float()
            assert (b @ a - expected).norm() < 1e-5 * expected.norm(), (method, rows, columns)
        assert merge_cores(stack, "tsv", {}, (rows, columns)).shape == (rows, columns)


@pytest.mark.parametrize(
    ("method", "options", "reason"),
    [
        ("ties", {}, "single entries"),
        ("dare_ties", {}, "single entries"),
        ("wudi", {}, "optimizer='sgd'"),
        ("optmerge", {"preset": "full"}, "optimizer='sgd'"),
        ("optmerge", {"preset": "full", "optimizer": None}, "optimizer='sgd'"),
        ("aswudi", {}, "no expert uses"),
    ],
)
def test_methods_that_leave_the_span_are_refused(family, tmp_path, method, options, reason):
    _, experts = family
    with pytest.raises(ValueError, match=reason):
        merge_adapters(experts, tmp_path / "out", method=method, method_options=options)
    assert not (tmp_path / "out").exists()


def test_a_module_is_found_on_disk_by_its_end():
    class Base(dict):
        folder = "base"

    names = (
        "language_model.model.layers.1.mlp.up_proj.weight",
        "vision.layers.1.mlp.up_proj.weight",
    )
    module = "model.language_model.layers.1.mlp.up_proj"
    assert parameter_of(module, Base.fromkeys(names)) == names[0]
    with pytest.raises(CheckpointError, match=r"layers\.7\.mlp\.up_proj stands for none"):
        parameter_of("model.language_model.layers.7.mlp.up_proj", Base.fromkeys(names))


def edit(folder, target, **settings):
    shutil.copytree(folder, target)
    config = json.loads((target / "adapter_config.json").read_text()) | settings
    (target / "adapter_config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "IA3"}, "of type IA3"),
        ({"use_dora": True}, "use_dora"),
        ({"lora_alpha": None}, "lora_alpha is not a number"),
    ],
)
def test_other_adapters_are_refused(family, tmp_path, settings, message):
    base, experts = family
    folder = edit(experts["e0"], tmp_path / "odd", **settings)
    with pytest.raises(CheckpointError, match=message):
        open_expert(folder, open_checkpoint(base))


def test_trained_modules_beside_the_factors_are_refused(family, tmp_path):
    base, experts = family
    folder = edit(experts["e0"], tmp_path / "odd")
    path = folder / "adapter_model.safetensors"
    save_file(load_file(path) | {"base_model.model.lm_head.weight": torch.zeros(40, 24)}, path)
    with pytest.raises(CheckpointError, match="lm_head.weight' is not a LoRA factor"):
        open_expert(folder, open_checkpoint(base))


def test_an_adapter_of_another_base_is_refused(family, tmp_path):
    _, experts = family
    model = tiny_model()
    model.resize_token_embeddings(44)
    config = model.config
    config.hidden_size = 32
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "wider")
    with pytest.raises(CheckpointError, match="adapter of another base model"):
        open_expert(experts["e0"], open_checkpoint(tmp_path / "wider"))


def test_a_base_model_is_no_adapter(family):
    _, experts = family
    with pytest.raises(CheckpointError, match="PEFT adapter"):
        open_checkpoint(experts["e0"])


def test_an_adapter_of_a_base_in_memory(family):
    base, experts = family
    stored = open_checkpoint(base)
    held = open_expert(experts["e0"], as_weights(dict(stored)))
    for name, tensor in open_expert(experts["e0"], stored).items():
        assert torch.equal(held[name], tensor)
    narrow = {name: tensor[..., :8] for name, tensor in stored.items()}
    with pytest.raises(CheckpointError, match="a model in memory has .* another base model"):
        open_expert(experts["e0"], as_weights(narrow))


def test_an_adapter_is_not_overwritten_by_its_own_merge(family, tmp_path):
    experts = {name: shutil.copytree(path, tmp_path / name) for name, path in family[1].items()}
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for output in (experts["e1"], experts["e1"] / "merged"):
        with pytest.raises(ValueError, match=r"(holds|is inside) expert e1: choose another"):
            merge_adapters(experts, output, method="weight_average", overwrite=True)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
