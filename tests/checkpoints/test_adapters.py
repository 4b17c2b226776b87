"""LoRA adapters: read as PEFT reads them, merged as `merge` merges them, refused when unclear."""

import json
import shutil

import pytest
import torch
from lora import make_lora_family, tiny_model
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import Qwen2ForCausalLM

from optmerge_core import merge, open_checkpoint
from optmerge_core.__main__ import main
from optmerge_core.checkpoints.adapters import Adapter, parameter_of
from optmerge_core.checkpoints.formats import CheckpointError
from optmerge_core.checkpoints.open import open_expert
from optmerge_core.checkpoints.weights import as_weights


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return make_lora_family(tmp_path_factory.mktemp("family"))


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


def test_inspect_takes_adapters(family, tmp_path, capsys):
    base, experts = family
    models = [{"model": str(folder), "name": name} for name, folder in experts.items()]
    recipe = tmp_path / "lora.yaml"
    recipe.write_text(json.dumps({"base_model": str(base), "models": models}))
    assert main(["inspect", str(recipe)]) == 0
    assert "14 parameters merge" in capsys.readouterr().out


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
