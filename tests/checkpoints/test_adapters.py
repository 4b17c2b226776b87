"""LoRA adapters: read as PEFT reads them, merged as `merge` merges them, refused when unclear."""

import json
import shutil

import pytest
import torch
from lora import LINEAR, make_adapter, make_lora_family, tiny_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import Qwen2ForCausalLM

from optmerge_core import merge, open_checkpoint
from optmerge_core.__main__ import main
from optmerge_core.checkpoints.adapters import Adapter, parameter_of
from optmerge_core.checkpoints.formats import CheckpointError
from optmerge_core.checkpoints.names import PREFIX
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
    fused = Base.fromkeys(["model.layers.0.mlp.experts.gate_up_proj"])
    with pytest.raises(CheckpointError, match=r"^base holds a layer's experts in one tensor, and"):
        parameter_of("model.layers.0.mlp.experts.1.up_proj", fused)


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


UP = "model.layers.0.mlp.up_proj"
ABOUT_HEADS = pytest.mark.filterwarnings(
    "ignore:(Model with|Model has|Setting `save_emb):UserWarning"
)


def start_adapter(root, how, dtype, steps=0.0):
    """A base in this dtype and an adapter that began by changing it, after some training."""
    tiny_model().to(dtype).save_pretrained(root / "base")
    model = Qwen2ForCausalLM.from_pretrained(root / "base", dtype="auto")
    settings = {"r": 3, "lora_alpha": 5, "target_modules": LINEAR, "init_lora_weights": how}
    model = get_peft_model(model, LoraConfig(**settings))
    model.peft_config["default"].init_lora_weights = True  # as PEFT's guide has it: convert later
    model.save_pretrained(root / "start")
    model.peft_config["default"].init_lora_weights = how
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.add_(steps * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(root / "adapter")
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", ["pissa", "olora"])
def test_an_adapter_that_began_by_changing_its_base(tmp_path, how, dtype):
    start_adapter(tmp_path, how, dtype, steps=0.1)
    base = Qwen2ForCausalLM.from_pretrained(tmp_path / "base", dtype="auto")
    weights = open_checkpoint(tmp_path / "base")
    merged = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload().state_dict()
    adapter = open_expert(tmp_path / "adapter", weights)
    for name in weights:
        # Without the rounding of what is left of the base, which PEFT keeps in its dtype.
        atol = max(2 * torch.finfo(dtype).eps * merged[name].abs().max().item(), 1e-6)
        torch.testing.assert_close(adapter[name].to(dtype), merged[name], atol=atol, rtol=1e-5)
    b, a = adapter.factors[UP]  # trained, and of the beginning: that is not small
    assert b.shape[1] == 6 and (b[:, 3:] @ a[3:]).norm() > 0.2 * (b @ a).norm()


@pytest.mark.parametrize("how", ["pissa", "olora"])
def test_untrained_it_changes_nothing(tmp_path, how):
    start_adapter(tmp_path, how, torch.float32)
    adapter = open_expert(tmp_path / "adapter", open_checkpoint(tmp_path / "base"))
    assert all(adapter.task_vector(name).abs().max() < 1e-7 for name in adapter)


@pytest.mark.filterwarnings("ignore:(PiSSA|OLoRA) changes the base:UserWarning")
@pytest.mark.parametrize("how", ["pissa", "olora", "pissa_niter_4"])
def test_converted_by_peft_it_is_a_plain_adapter(tmp_path, how):
    model = start_adapter(tmp_path, how, torch.float32, steps=0.1)
    model.save_pretrained(
        tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    trained, weights = model.merge_and_unload().state_dict(), open_checkpoint(tmp_path / "base")
    plain = open_expert(tmp_path / "plain", weights)
    for name in weights:
        torch.testing.assert_close(plain[name], trained[name], atol=1e-6, rtol=1e-5)
    if how == "pissa_niter_4":
        with pytest.raises(CheckpointError, match="path_initial_model_for_weight_conversion"):
            open_expert(tmp_path / "adapter", weights)


def test_a_base_that_is_not_finite_has_no_beginning(tmp_path):
    start_adapter(tmp_path, "pissa", torch.float32)
    weights = dict(open_checkpoint(tmp_path / "base"))
    weights[f"{UP}.weight"][0, 0] = float("nan")
    adapter = open_expert(tmp_path / "adapter", as_weights(weights))
    with pytest.raises(CheckpointError, match=rf"{UP}: the base's weight has no singular values"):
        adapter.task_vector(f"{UP}.weight")


@ABOUT_HEADS
def test_an_adapted_head_that_is_tied_merges_apart(tmp_path):
    """PEFT's own merge changes the embeddings with it: another model than the one trained."""
    tiny_model().save_pretrained(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", 1, target_modules=["lm_head", "up_proj"])
    assert f"{PREFIX}lm_head.base_layer.weight" in load_file(adapter / "adapter_model.safetensors")
    ids = torch.arange(8)[None]
    trained = PeftModel.from_pretrained(tiny_model(), adapter)
    expected = trained(ids).logits.detach()
    assert (trained.merge_and_unload()(ids).logits - expected).abs().max() > 0.01
    with pytest.warns(match="lm_head.weight is not the embeddings"):
        merge(tmp_path / "base", {"a": adapter}, tmp_path / "all", method="ties", scope="all",
              method_options={"density": 1.0})  # fmt: skip
    ours = Qwen2ForCausalLM.from_pretrained(tmp_path / "all")(ids).logits
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)
    with pytest.warns(match=r"outside the merge; the base's are kept \(lm_head\.weight\)"):
        merge(tmp_path / "base", {"a": adapter}, tmp_path / "linear", method="weight_average")


@ABOUT_HEADS
def test_a_tied_head_that_began_by_changing_the_embeddings_is_refused(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    settings = {"target_modules": ["lm_head"], "init_lora_weights": "pissa"}
    adapter = make_adapter(tmp_path / "adapter", 1, **settings)
    with pytest.raises(CheckpointError, match="lm_head is tied to the embeddings, which init_lora"):
        open_expert(adapter, open_checkpoint(tmp_path / "base"))


@ABOUT_HEADS
def test_the_weight_beside_the_factors_takes_the_bases_place(tmp_path):
    model, base = tiny_model(), tmp_path / "base"
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    model.save_pretrained(base)
    adapter = make_adapter(tmp_path / "adapter", 1, target_modules=["lm_head"])
    path = adapter / "adapter_model.safetensors"
    stored = torch.randn(40, 24, generator=torch.Generator().manual_seed(2))
    save_file(load_file(path) | {f"{PREFIX}lm_head.base_layer.weight": stored}, path)
    peft = PeftModel.from_pretrained(Qwen2ForCausalLM.from_pretrained(base), adapter)
    merged = peft.merge_and_unload().lm_head.weight
    opened = open_expert(adapter, open_checkpoint(base))
    torch.testing.assert_close(opened["lm_head.weight"], merged.detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 4}, r"has factors of rank 3, and adapter_config\.json says 4"),
        ({"rank_pattern": {"up_proj": 2}}, r"up_proj has factors of rank 3, and .* says 2"),
        (
            {"exclude_modules": ["up_proj"]},
            "up_proj has factors, and adapter_config.json leaves it",
        ),
        (
            {"layers_to_transform": [1]},
            "layers.0.mlp.* has factors, and adapter_config.json leaves",
        ),
        ({"target_modules": ["q_proj"]}, "PEFT would not load them"),
    ],
)
def test_factors_that_the_settings_do_not_have_are_refused(family, tmp_path, settings, message):
    base, experts = family
    with pytest.raises(CheckpointError, match=message):
        open_expert(edit(experts["e0"], tmp_path / "odd", **settings), open_checkpoint(base))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("base_model.", "module.base_model."),
        ("base_model.", "module._orig_mod.base_model."),
        ("base_model.model.", "base_model.model._orig_mod."),
        (".self_attn.", "._fsdp_wrapped_module.self_attn."),
        (".weight", ".default.weight"),
    ],
)
def test_what_wrappers_add_to_names(family, tmp_path, old, new):
    base, experts = family
    path = edit(experts["e2"], tmp_path / "wrapped") / "adapter_model.safetensors"
    save_file({name.replace(old, new, 1): t for name, t in load_file(path).items()}, path)
    ours = open_expert(tmp_path / "wrapped", open_checkpoint(base))
    plain = open_expert(experts["e2"], open_checkpoint(base))
    assert ours.modules == plain.modules
    assert all(torch.equal(ours.task_vector(name), plain.task_vector(name)) for name in ours)


def test_a_factor_that_is_there_twice_is_refused(family, tmp_path):
    base, experts = family
    path = edit(experts["e0"], tmp_path / "twice") / "adapter_model.safetensors"
    tensors = load_file(path)
    again = {name.replace(".weight", ".default.weight"): t.clone() for name, t in tensors.items()}
    save_file(tensors | again, path)
    with pytest.raises(CheckpointError, match="is nothing that LoRA trains, or twice"):
        open_expert(tmp_path / "twice", open_checkpoint(base))
