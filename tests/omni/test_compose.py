"""Composition of stock specialists: LLaVA, Qwen2-Audio and Video-LLaVA on one tiny Llama."""

import hashlib
import json
import re
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from specialists import SPECIALISTS, TEXT, VISION, WORDS, prompt, save_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from optmerge_core.checkpoints.names import language_name
from optmerge_core.merging.families import mergeable
from optmerge_core.merging.loop import merge_tensors
from optmerge_core.omni import OmniForConditionalGeneration, compose
from optmerge_core.omni.specialists import open_specialist


@pytest.fixture(scope="module")
def omni(family, tmp_path_factory):
    folder = tmp_path_factory.mktemp("composed") / "omni"
    assert compose(family.base, family.folders, folder) == folder
    return folder


@torch.no_grad()
@pytest.mark.parametrize("modality", SPECIALISTS)
@pytest.mark.parametrize("loaded", [False, True], ids=["folder", "loaded"])
def test_one_specialist_is_itself(family, tmp_path, modality, loaded):
    source = family.models[modality] if loaded else family.folders[modality]
    compose(family.base, {modality: source}, tmp_path / "one", method="task_arithmetic")
    model = OmniForConditionalGeneration.from_pretrained(tmp_path / "one").eval()
    own = SPECIALISTS[modality][1]
    video = WORDS + 1
    ids = prompt(modality, ids=(WORDS, WORDS, video))
    inputs = family.inputs[modality]
    expected = family.models[modality](input_ids=ids, **inputs).logits
    logits = model(input_ids=ids, modality_inputs={modality: inputs}).logits
    size = min(logits.shape[-1], expected.shape[-1])
    torch.testing.assert_close(logits[..., :size], expected[..., :size], atol=1e-5, rtol=0)
    assert size >= WORDS + (not loaded) and own.text_config.num_hidden_layers == 2
    answers = [
        candidate.generate(input_ids=ids, max_new_tokens=4, do_sample=False, **given)
        for candidate, given in (
            (family.models[modality], inputs),
            (model, {"modality_inputs": {modality: inputs}}),
        )
    ]
    assert torch.equal(*answers)


def test_towers_are_copied_byte_for_byte(family, omni):
    composed = load_file(omni / "model.safetensors")
    for modality, model in family.models.items():
        towers = {
            n: t for n, t in model.model.state_dict().items() if not n.startswith("language_model.")
        }
        assert len(towers) > 5
        for name, tensor in towers.items():
            assert torch.equal(composed.pop(f"specialists.{modality}.{name}"), tensor)
    assert all(name.startswith(("language_model.", "lm_head.")) for name in composed)


@torch.no_grad()
def test_text_alone_is_the_merged_language_model(family, omni):
    """Merged by the core from the specialists' language models, embeddings and norms averaged."""
    merged = LlamaForCausalLM.from_pretrained(family.base)
    state = {n: t.clone() for n, t in merged.state_dict().items()}
    names = mergeable({n: tuple(t.shape) for n, t in state.items()}, "llama")
    experts = {}
    for modality, model in family.models.items():
        experts[modality] = {language_name(n): t for n, t in model.state_dict().items()}
    found = merge_tensors(
        state, experts, names, method="optmerge", method_options={"preset": "modality"}
    )
    for name, tensor in state.items():
        rows = torch.stack([expert[name][: len(tensor)] for expert in experts.values()])
        merged.state_dict()[name].copy_(tensor + found[name] if name in found else rows.mean(0))
    model = OmniForConditionalGeneration.from_pretrained(omni).eval()
    ids = torch.tensor([[1, 5, 8, 30, 12]])
    logits = model(input_ids=ids).logits[..., :WORDS]
    torch.testing.assert_close(logits, merged(input_ids=ids).logits, atol=1e-5, rtol=0)
    labels = ids.clone()
    expected = merged(input_ids=ids, labels=labels).loss
    assert model.lm_head.weight.shape[0] == WORDS + 3
    assert model(input_ids=ids, labels=labels).loss > 0.9 * expected


@torch.no_grad()
def test_all_modalities_are_seen_at_once(family, omni):
    model = AutoModelForCausalLM.from_pretrained(omni).eval()
    tokenizer = AutoTokenizer.from_pretrained(omni)
    numbers = tokenizer.convert_tokens_to_ids(["<image>", "<|AUDIO|>", "<video>"])
    assert numbers == [WORDS, WORDS + 1, WORDS + 2]
    ids = prompt(*SPECIALISTS)
    logits = model(input_ids=ids, modality_inputs=family.inputs).logits[0, -1]
    for modality, inputs in family.inputs.items():
        first = next(iter(inputs))
        changed = family.inputs | {modality: inputs | {first: 2 * inputs[first]}}
        assert not torch.allclose(
            model(input_ids=ids, modality_inputs=changed).logits[0, -1], logits
        )
    settings = {"max_new_tokens": 5, "do_sample": False, "suppress_tokens": numbers}
    told = model.generate(input_ids=ids, modality_inputs=family.inputs, **settings)
    slow = ids
    for _ in range(5):
        logits = model(input_ids=slow, modality_inputs=family.inputs).logits[:, -1, :WORDS]
        slow = torch.cat([slow, logits.argmax(-1)[:, None]], 1)
    assert torch.equal(told, slow)


def test_saving_again_changes_nothing(omni, tmp_path):
    model = OmniForConditionalGeneration.from_pretrained(omni)
    model.save_pretrained(tmp_path)
    before, after = (load_file(folder / "model.safetensors") for folder in (omni, tmp_path))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def on_the_hub(name):
    """A parameter's name in llava-hf/llava-1.5-7b-hf and LanguageBind/Video-LLaVA-7B-hf."""
    name = name.removeprefix("model.")
    name = re.sub(r"^(\w+_tower)\.(?!vision_model)", r"\1.vision_model.", name)
    name = re.sub(r"^language_model\.(?!model|lm_head)", "language_model.model.", name)
    return f"language_model.{name}" if name == "lm_head.weight" else name


def test_the_hubs_names_are_those_of_the_real_checkpoints(family):
    names = {on_the_hub(name) for name in family.models["vision"].state_dict()}
    assert names > {
        "language_model.lm_head.weight",
        "language_model.model.embed_tokens.weight",
        "language_model.model.layers.0.self_attn.q_proj.weight",
        "multi_modal_projector.linear_1.weight",
        "vision_tower.vision_model.embeddings.class_embedding",
        "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight",
        "vision_tower.vision_model.pre_layrnorm.weight",
    }


@pytest.mark.parametrize("rename", [on_the_hub, str], ids=["hub", "memory"])
@pytest.mark.parametrize("modality", ["vision", "video"])
def test_names_on_the_hub_and_in_memory_give_the_same_bytes(
    family, omni, tmp_path, modality, rename
):
    folder = tmp_path / "renamed"
    shutil.copytree(family.folders[modality], folder)
    state = family.models[modality].state_dict()
    save_file({rename(n): t for n, t in state.items()}, folder / "model.safetensors")
    compose(family.base, family.folders | {modality: folder}, tmp_path / "omni")
    composed = (tmp_path / "omni/model.safetensors").read_bytes()
    assert composed == (omni / "model.safetensors").read_bytes()


@torch.no_grad()
def test_half_precision_folders_load_in_any_precision(family, tmp_path):
    folders = {"base": tmp_path / "base"} | {m: tmp_path / m for m in family.folders}
    for name, folder in folders.items():
        shutil.copytree(family.base if name == "base" else family.folders[name], folder)
        model = LlamaForCausalLM if name == "base" else SPECIALISTS[name][0]
        model.from_pretrained(folder, dtype=torch.float16).save_pretrained(folder)
    half = compose(folders.pop("base"), folders, tmp_path / "half")
    assert {t.dtype for t in load_file(half / "model.safetensors").values()} == {torch.float16}
    for dtype in (torch.float32, torch.bfloat16, "auto"):
        model = OmniForConditionalGeneration.from_pretrained(half, dtype=dtype)
        expected = torch.float16 if dtype == "auto" else dtype
        assert {p.dtype for p in model.parameters()} == {expected}
    model = OmniForConditionalGeneration.from_pretrained(half, dtype=torch.float32).eval()
    assert (
        model(input_ids=prompt(*SPECIALISTS), modality_inputs=family.inputs).logits.isfinite().all()
    )


@pytest.mark.parametrize("method", ["tsv", "wudi", "ties", "dare_ties", "iso_c"])
def test_two_specialists_by_any_method(family, tmp_path, method):
    two = {m: family.folders[m] for m in ("audio", "vision")}
    folder = compose(family.base, two, tmp_path / "two", method=method)
    model = OmniForConditionalGeneration.from_pretrained(folder)
    assert list(model.specialists) == ["audio", "vision"]
    assert (folder / "specialists/audio/tokenizer.json").is_file()


@torch.no_grad()
def test_four_specialists(family, tmp_path):
    """A second LLaVA, for depth, with a placeholder of its own."""
    family.models["vision"].save_pretrained(tmp_path / "depth")
    save_tokenizer(tmp_path / "depth", ["<depth>"])
    four = family.folders | {"depth": tmp_path / "depth"}
    folder = compose(family.base, four, tmp_path / "four", method="tsv")
    model = OmniForConditionalGeneration.from_pretrained(folder).eval()
    number = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("<depth>")
    assert number == WORDS + 3 and set(model.specialists) == set(four)
    ids = torch.cat([prompt(*SPECIALISTS), torch.tensor([[number] * 4 + [7, 9]])], 1)
    inputs = family.inputs | {"depth": {"pixel_values": torch.randn(1, 3, 28, 28)}}
    logits = model(input_ids=ids, modality_inputs=inputs).logits[0, -1]
    for modality in four:
        noise = {
            k: torch.randn_like(x) if x.is_floating_point() else x
            for k, x in inputs[modality].items()
        }
        other = model(input_ids=ids, modality_inputs=inputs | {modality: noise}).logits[0, -1]
        assert not torch.allclose(logits, other)


@torch.no_grad()
def test_an_adapter_of_a_specialist(family, tmp_path):
    torch.manual_seed(2)
    model = LlavaForConditionalGeneration.from_pretrained(family.folders["vision"])
    ends = ("layers.0.mlp.up_proj", "layers.1.self_attn.q_proj")
    modules = [n for n, _ in model.named_modules() if "language" in n and n.endswith(ends)]
    settings = LoraConfig(r=2, target_modules=modules, modules_to_save=["multi_modal_projector"])
    adapted = get_peft_model(model, settings)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.normal_(std=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    expected = adapted.merge_and_unload().eval()
    compose(
        family.base, {"vision": tmp_path / "adapter"}, tmp_path / "one", method="task_arithmetic"
    )
    model = OmniForConditionalGeneration.from_pretrained(tmp_path / "one").eval()
    ids, inputs = prompt("vision"), family.inputs["vision"]
    logits = model(input_ids=ids, modality_inputs={"vision": inputs}).logits
    wanted = expected(input_ids=ids, **inputs).logits[..., : WORDS + 1]
    torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_small_update_of_a_bfloat16_model_is_not_rounded_away(family, tmp_path):
    model = LlavaForConditionalGeneration.from_pretrained(
        family.folders["vision"], dtype=torch.bfloat16
    )
    model.save_pretrained(tmp_path / "llava")
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "llava", dtype=torch.float32)
    settings = LoraConfig(r=2, target_modules=r".*language_model.*layers\.0\.mlp\.up_proj")
    adapted = get_peft_model(model, settings)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.fill_(1e-3)
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "llava")
    adapted.save_pretrained(tmp_path / "adapter")
    name = "model.layers.0.mlp.up_proj.weight"
    before = open_specialist(tmp_path / "llava")
    after = open_specialist(tmp_path / "adapter")
    update = after.language_model[name].float() - before.language_model[name].float()
    scale = settings.lora_alpha / settings.r
    torch.testing.assert_close(update, torch.full_like(update, scale * 2e-6), rtol=0.05, atol=0)
    assert after.towers.keys() == before.towers.keys()
    assert all(torch.equal(tensor, before.towers[n]) for n, tensor in after.towers.items())
    assert {t.dtype for t in after.towers.values()} == {torch.bfloat16}


def adapted(model, folder, base, **settings):
    """PEFT's model with a drawn LoRA adapter of `base`, saved in a folder."""
    given = {"r": 2, "target_modules": r".*language_model.*up_proj"} | settings
    peft, generator = get_peft_model(model, LoraConfig(**given)), torch.Generator().manual_seed(3)
    for name, parameter in peft.named_parameters():
        if "lora_" in name or parameter.requires_grad:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    peft.save_pretrained(folder)
    edit(folder, base_model_name_or_path=str(base))
    return peft


def edit(folder, **settings):
    content = json.loads((folder / "adapter_config.json").read_text()) | settings
    (folder / "adapter_config.json").write_text(json.dumps(content))


def test_an_adapter_is_opened_without_a_word_of_what_peft_asks_transformers(family, tmp_path):
    model = LlavaForConditionalGeneration.from_pretrained(family.folders["vision"])
    adapted(model, tmp_path / "adapter", family.folders["vision"])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        open_specialist(tmp_path / "adapter")
    assert [str(warning.message) for warning in told] == []


@pytest.mark.parametrize("targets", [["up_proj", "q_proj"], ["layers.1.self_attn.q_proj"]])
@pytest.mark.parametrize("path", ["", "model."])
def test_an_adapter_made_on_the_text_model_alone(family, tmp_path, path, targets):
    """PEFT puts it on the whole model by its own paths: nowhere, or beside it on the towers."""
    base, folder = family.folders["vision"], tmp_path / "adapter"
    model = LlavaForConditionalGeneration.from_pretrained(base)
    peft = adapted(model.model.language_model, folder, base, target_modules=targets)
    file = folder / "adapter_model.safetensors"
    prefix = "base_model.model."
    save_file({n.replace(prefix, prefix + path): t for n, t in load_file(file).items()}, file)
    peft.merge_and_unload()
    before, after = open_specialist(base), open_specialist(folder)
    own = {language_name(n): t for n, t in model.state_dict().items()}
    assert any(not torch.equal(own[n], t) for n, t in before.language_model.items())
    for name, tensor in after.language_model.items():
        torch.testing.assert_close(tensor, own[name], atol=1e-6, rtol=0)
    assert all(torch.equal(tensor, before.towers[n]) for n, tensor in after.towers.items())


@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["embed_tokens", "lm_head"]}])
def test_an_adapter_with_a_larger_vocabulary(family, tmp_path, settings):
    """Its embeddings, head and tokenizer lie beside its factors: they are the specialist's."""
    base, folder = family.folders["vision"], tmp_path / "adapter"
    model = LlavaForConditionalGeneration.from_pretrained(base)
    model.resize_token_embeddings(WORDS + 4, mean_resizing=False)
    peft = adapted(model, folder, base, **settings)
    peft.save_pretrained(folder, save_embedding_layers=True)
    edit(folder, base_model_name_or_path=str(base))
    save_tokenizer(folder, ["<image>", "<a>", "<b>"])
    merged = peft.merge_and_unload().state_dict()
    tensors = composed(
        SimpleNamespace(base=family.base, folders={"vision": folder}), tmp_path / "out",
        method="task_arithmetic",
    )  # fmt: skip
    for name, own in (
        ("embed_tokens", "model.language_model.embed_tokens"),
        ("lm_head", "lm_head"),
    ):
        found = tensors[f"{'' if name == 'lm_head' else 'language_model.'}{name}.weight"]
        assert len(found) == WORDS + 3
        torch.testing.assert_close(found, merged[f"{own}.weight"][: WORDS + 3], atol=1e-6, rtol=0)
    for place in (tmp_path / "out", tmp_path / "out/specialists/vision"):
        tokenizer = AutoTokenizer.from_pretrained(place)
        assert tokenizer.convert_tokens_to_ids(["<image>", "<b>"]) == [WORDS, WORDS + 2]
    assert not (tmp_path / "out/specialists/vision/adapter_config.json").exists()
    OmniForConditionalGeneration.from_pretrained(tmp_path / "out")


def test_a_token_whose_row_was_not_saved_is_refused(family, tmp_path):
    """Zeros would stand for it, and a logit of 0; PEFT's model of the same cannot read it."""
    base, folder = family.folders["vision"], tmp_path / "adapter"
    model = LlavaForConditionalGeneration.from_pretrained(base)
    model.resize_token_embeddings(WORDS + 4, mean_resizing=False)
    adapted(model, folder, base).save_pretrained(folder, save_embedding_layers=False)
    edit(folder, base_model_name_or_path=str(base))
    save_tokenizer(folder, ["<image>", "<a>", "<b>"])
    own = PeftModel.from_pretrained(LlavaForConditionalGeneration.from_pretrained(base), folder)
    with pytest.raises(IndexError):
        own(input_ids=torch.tensor([[WORDS + 2]]))
    text = r"vision: its tokenizer adds '<b>', number 42, and its embeddings have 42 rows, none for"
    refused(family, tmp_path, {"vision": folder}, f"{text}.*save_embedding_layers=True")
    save_tokenizer(folder, ["<image>", "<a>"])  # of that token the base has a row
    compose(family.base, {"vision": folder}, tmp_path / "out", method="task_arithmetic")


def test_a_token_before_an_image_is_read_as_a_word(family, tmp_path):
    """config.json names it as it does <image>; two specialists' rows of it are not one."""
    folders = {}
    for number, modality in enumerate(("vision", "audio")):
        folder = folders[modality] = shutil.copytree(family.folders[modality], tmp_path / modality)
        placeholder = SPECIALISTS[modality][2]
        save_tokenizer(folder, [*placeholder, "<start>"])
        settings = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(
            json.dumps(settings | {"media_start_token_id": WORDS + 1})
        )
        tensors = load_file(folder / "model.safetensors")
        (name,) = (n for n in tensors if n.endswith("embed_tokens.weight"))
        tensors[name][WORDS + 1] = number
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    refused(family, tmp_path, folders, "token 41 is trained in vision and in audio, with different")


def test_a_whole_specialist_without_a_words_row_is_refused_and_without_a_features_not(
    family, tmp_path
):
    """Rows as the base has them: no image is looked up there, a word would be."""
    folder = changed(
        family,
        tmp_path,
        lambda t: {n: x[:WORDS] if len(x) == WORDS + 2 else x for n, x in t.items()},
    )
    settings = json.loads((folder / "config.json").read_text())
    settings["text_config"]["vocab_size"] = WORDS
    (folder / "config.json").write_text(json.dumps(settings))
    compose(family.base, {"vision": folder}, tmp_path / "out", method="task_arithmetic")
    save_tokenizer(folder, ["<image>", "<sep>"])
    refused(family, tmp_path / "no", {"vision": folder}, "adds '<sep>', number 41, .* have 40 rows")


def test_a_tied_specialist_gives_an_untied_base_the_heads_rows_of_its_tokens(family, tmp_path):
    folder = changed(family, tmp_path, lambda t: {n: x for n, x in t.items() if "lm_head" not in n})
    settings = json.loads((folder / "config.json").read_text())
    for part in (settings, settings["text_config"]):
        part["tie_word_embeddings"] = True
    (folder / "config.json").write_text(json.dumps(settings))
    given = SimpleNamespace(base=family.base, folders={"vision": folder})
    tensors = composed(given, tmp_path / "out", method="task_arithmetic")
    head, embeddings = tensors["lm_head.weight"], tensors["language_model.embed_tokens.weight"]
    assert embeddings[WORDS].norm() > 0 and torch.equal(head[WORDS:], embeddings[WORDS:])


def test_a_head_of_its_own_is_not_lost_in_a_tied_base(family, tmp_path):
    base = LlamaForCausalLM.from_pretrained(family.base)
    settings = base.config.to_dict() | {"tie_word_embeddings": True}
    tied = SimpleNamespace(base=shutil.copytree(family.base, tmp_path / "base"))
    LlamaForCausalLM(LlamaConfig(**settings)).save_pretrained(tied.base)
    assert not any("lm_head" in name for name in load_file(tied.base / "model.safetensors"))
    message = "vision: lm_head.weight is not the specialist's embeddings, which .*base ties it to"
    refused(tied, tmp_path, {"vision": family.folders["vision"]}, message)
    folder = changed(family, tmp_path, lambda t: {
        n: t[n.replace("lm_head", "model.embed_tokens")].clone() for n in t
    })  # fmt: skip
    compose(tied.base, {"vision": folder}, tmp_path / "out", method="task_arithmetic")
    composed = load_file(tmp_path / "out" / "model.safetensors")
    assert len(composed["language_model.embed_tokens.weight"]) == WORDS + 1


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"alora_invocation_tokens": [1]}, "the adapter uses alora_invocation_tokens; it acts on"),
        ({"layer_replication": [[0, 2]]}, "the adapter uses layer_replication; its model has"),
        ({"init_lora_weights": "pissa_niter_4"}, "config.json: init_lora_weights 'pissa_niter_4'"),
        ({"r": 3}, r"PEFT cannot merge this adapter into \S+vision \(.*size mismatch for "),
        ({"target_modules": ["nothing"]}, "PEFT cannot merge .*not found in the base model"),
        ({"target_modules": ["down_proj"]}, "PEFT cannot merge .*Found missing adapter keys"),
        ({"peft_type": "NO_SUCH"}, "PEFT cannot merge this adapter into .*NO_SUCH"),
        ({"base_model_name_or_path": ""}, "adapter_config.json: base_model_name_or_path '' must"),
        ({"base_model_name_or_path": None}, "must name the specialist .*an empty path"),
        ({"base_model_name_or_path": "/gone"}, r"'/gone' must name .*\(/gone: no such folder"),
        ({"base_model_name_or_path": "hollow"}, r"'hollow' must name .*hollow: no safetensors wei"),
        ({"base_model_name_or_path": "language"}, "into .*adapter/language .*stands for none"),
        ({"base_model_name_or_path": "audio"}, "PEFT cannot merge .*stands for none"),
    ],
)  # fmt: skip
def test_adapters_that_cannot_be_merged_are_refused(family, tmp_path, settings, text):
    base, folder = family.folders["vision"], tmp_path / "adapter"
    model = LlavaForConditionalGeneration.from_pretrained(base)
    adapted(model, folder, base, target_modules=r".*vision_tower.*fc1|.*language_model.*up_proj")
    edit(folder, **settings)
    (folder / "hollow").mkdir()
    (folder / "language").symlink_to(family.base)
    (folder / "audio").symlink_to(family.folders["audio"])
    refused(family, tmp_path, {"vision": folder}, text)


def changed(family, tmp_path, change):
    """A copy of the vision specialist, its tensors changed."""
    folder = shutil.copytree(family.folders["vision"], tmp_path / "changed")
    tensors = change(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_wrappers_of_training_and_an_adapter_beside_it_change_nothing(family, tmp_path):
    folder = changed(
        family, tmp_path, lambda tensors: {f"module.{n}": t for n, t in tensors.items()}
    )
    model = LlavaForConditionalGeneration.from_pretrained(family.folders["vision"])
    adapted(model, folder, family.folders["vision"])
    with pytest.warns(match="changed holds an adapter .* beside whole weights, which are taken"):
        compose(family.base, {"vision": folder}, tmp_path / "out", method="ties")
    compose(family.base, {"vision": family.folders["vision"]}, tmp_path / "plain", method="ties")
    ours, plain = (tmp_path / f / "model.safetensors" for f in ("out", "plain"))
    assert ours.read_bytes() == plain.read_bytes()


def test_what_is_no_whole_specialist_is_refused(family, tmp_path):
    whole = load_file(family.folders["vision"] / "model.safetensors")
    gone = next(name for name in whole if "projector" in name)
    folder = changed(family, tmp_path, lambda t: {n: x for n, x in t.items() if n != gone})
    refused(family, tmp_path, {"vision": folder}, "1 parameters of the model are missing")
    refused(family, tmp_path, {"text": family.base}, "base: LlamaForCausalLM has no towers beside")
    (folder / "config.json").write_text("{}")
    refused(family, tmp_path, {"vision": folder}, "changed: config.json is missing or empty")
    bare = shutil.copytree(family.base, tmp_path / "bare")
    (bare / "config.json").unlink()
    with pytest.raises(ValueError, match="bare: config.json is missing or empty"):
        compose(bare, {"vision": family.folders["vision"]}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_multimodal_base_gives_its_language_model(family, tmp_path):
    base = shutil.copytree(family.folders["vision"], tmp_path / "base")
    compose(base, {"vision": family.folders["vision"]}, tmp_path / "out", method="weight_average")
    model = OmniForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    inputs, ids = family.inputs["vision"], prompt("vision")
    expected = family.models["vision"](input_ids=ids, **inputs).logits
    logits = model(input_ids=ids, modality_inputs={"vision": inputs}).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


def test_frequencies_that_old_checkpoints_saved_are_no_parameters(family, tmp_path):
    old = shutil.copytree(family.base, tmp_path / "old")
    weights = load_file(old / "model.safetensors")
    weights |= {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(4) for n in (0, 1)}
    save_file(weights, old / "model.safetensors", metadata={"format": "pt"})
    compose(family.base, family.folders, tmp_path / "one", method="ties")
    compose(old, family.folders, tmp_path / "two", method="ties")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_a_tokenizer_that_needs_more_packages_says_which(family, tmp_path, monkeypatch):
    def needs(*_, **__):
        raise ValueError("`tiktoken` is required to read a `tiktoken` file.")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", needs)
    base = shutil.copytree(family.base, tmp_path / "base")
    with pytest.raises(ValueError, match="is required to read"):
        compose(base, family.models, tmp_path / "omni")
    (base / "tokenizer.json").rename(base / "tokenizer.model")
    with pytest.raises(ValueError, match="tokenizer.model, .*: pip install sentencepiece protobuf"):
        compose(base, family.models, tmp_path / "omni")
    assert not (tmp_path / "omni").exists()


def test_report_and_card_say_what_was_composed(family, omni, tmp_path):
    report = json.loads((omni / "merge_report.json").read_text())
    inputs = {"base": (family.base, report["base_model"])}
    inputs |= {m: (family.folders[m], report["experts"][m]) for m in family.folders}
    for folder, item in inputs.values():
        assert item["location"] == str(folder)
        assert item["sha256"] == {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in Path(folder).glob("*.safetensors")
        }
    merged = load_file(omni / "model.safetensors")
    base = load_file(Path(family.base, "model.safetensors"))
    assert len(report["parameters"]) == 14  # seven matrices in each of two layers
    for record in report["parameters"]:
        change = merged["language_" + record["name"]] - base[record["name"]]
        assert record["merged_norm"] == pytest.approx(change.norm().item(), rel=1e-4)
        assert record["expert_norms"].keys() == family.folders.keys()
    card = (omni / "README.md").read_text()
    call = card.partition("```python\n")[2].partition("```")[0].replace("'merged'", "'again'")
    exec(call.replace('"merged"', repr(str(tmp_path / "again"))))
    assert (tmp_path / "again/model.safetensors").read_bytes() == (
        omni / "model.safetensors"
    ).read_bytes()


def test_an_adapters_report_has_its_bases_hashes(family, tmp_path):
    model = LlavaForConditionalGeneration.from_pretrained(family.folders["vision"])
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=r".*language_model.*up_proj"))
    adapted.save_pretrained(tmp_path / "adapter")
    compose(family.base, {"vision": tmp_path / "adapter"}, tmp_path / "one", method="ties")
    report = json.loads((tmp_path / "one/merge_report.json").read_text())
    assert report["experts"]["vision"]["sha256"].keys() == {
        "model.safetensors", "adapter_model.safetensors"
    }  # fmt: skip


@pytest.mark.parametrize("where", ["language_model", "vision_tower"])
def test_a_specialist_with_nan_is_refused_before_the_merge(family, tmp_path, where):
    folder = tmp_path / "broken"
    shutil.copytree(family.folders["vision"], folder)
    weights = load_file(folder / "model.safetensors")
    name = next(n for n, tensor in weights.items() if where in n and tensor.ndim == 2)
    weights[name][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    refused(family, tmp_path, {"vision": folder}, r"1 NaN or Inf")


def refused(family, tmp_path, specialists, message, error=ValueError):
    with pytest.raises(error, match=message):
        compose(family.base, specialists, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_language_model_of_another_shape_is_refused(family, tmp_path):
    wide = LlavaConfig(
        vision_config=VISION, text_config=TEXT | {"intermediate_size": 64}, image_token_id=WORDS
    )
    LlavaForConditionalGeneration(wide).save_pretrained(tmp_path / "wide")
    message = r"vision: model\.layers\.0\.mlp\.\w+\.weight has shape \(.*64.*\) in .* and \(.*48"
    refused(family, tmp_path, {"vision": tmp_path / "wide"}, message)
    deep = LlavaConfig(
        vision_config=VISION, text_config=TEXT | {"num_hidden_layers": 3}, image_token_id=WORDS
    )
    LlavaForConditionalGeneration(deep).save_pretrained(tmp_path / "deep")
    refused(family, tmp_path, {"vision": tmp_path / "deep"}, r"has model\.layers\.2\..*has not")


def test_tokenizers_that_disagree_are_refused(family, tmp_path):
    folder = tmp_path / "other"
    family.models["audio"].save_pretrained(folder)
    save_tokenizer(folder, ["<|AUDIO|>"], first="other")
    message = r"audio: token 'other' is number 3 in its tokenizer, absent in the base's"
    refused(family, tmp_path, family.folders | {"audio": folder}, message)


def test_token_numbers_claimed_twice_are_refused(family, tmp_path):
    message = r"audio uses token 40 for audio_token_\w+, vision for image input"
    loaded = {m: family.models[m] for m in ("vision", "audio")}
    refused(family, tmp_path, loaded, message)


@pytest.mark.parametrize("place", ["base", "vision"])
def test_an_input_is_not_overwritten(family, tmp_path, place):
    base = shutil.copytree(family.base, tmp_path / "base")
    vision = shutil.copytree(family.folders["vision"], tmp_path / "vision")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for output, text in ((tmp_path / place, "holds"), (tmp_path / place / "new", "is inside")):
        with pytest.raises(ValueError, match=f"{output} {text} .*: choose another output folder"):
            compose(base, {"vision": vision}, output, method="ties", overwrite=True)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_inputs_that_do_not_fit_are_refused(family, omni):
    model = OmniForConditionalGeneration.from_pretrained(omni)
    with pytest.raises(ValueError, match="no specialist for 'smell': this model has"):
        model(input_ids=prompt("vision"), modality_inputs={"smell": {}})
    with pytest.raises(ValueError, match="give either input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match=r"audio: the prompt has 4 tokens and becomes 13 long"):
        one = torch.tensor([[1, 5, WORDS + 1, 9]])
        model(input_ids=one, modality_inputs={"audio": family.inputs["audio"]})


def composed(models, folder, **arguments) -> dict[str, torch.Tensor]:
    compose(models.base, models.folders, folder, **arguments)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("options", [{"steps": 300}, {"learning_rate": 0.05}, {"momentum": 0.9}])
def test_an_option_keeps_the_preset_it_stands_beside(family, omni, tmp_path, options):
    """These are the preset `modality`'s own values: nothing changes."""
    composed(family, tmp_path / "out", method_options=options)
    ours, default = (f / "model.safetensors" for f in (tmp_path / "out", omni))
    assert ours.read_bytes() == default.read_bytes()
    report = json.loads((tmp_path / "out/merge_report.json").read_text())
    assert report["method_options"] == {"preset": "modality"} | options
    full = composed(family, tmp_path / "full", method_options={"preset": "full"})
    assert not all(torch.equal(full[n], t) for n, t in load_file(default).items())


@pytest.mark.parametrize("method", ["ties", "dare_ties"])
def test_trimming_over_the_whole_language_model(family, tmp_path, method):
    specialists = {m: open_specialist(f).language_model for m, f in family.folders.items()}
    base = load_file(Path(family.base, "model.safetensors"))
    names = mergeable({n: tuple(t.shape) for n, t in base.items()}, "llama")
    expected = {
        trim: merge_tensors(base, specialists, names, method=method, trim=trim, seed=5)
        for trim in ("model", "tensor")
    }
    assert any(not torch.equal(expected["model"][n], expected["tensor"][n]) for n in names)
    found = composed(family, tmp_path / "out", method=method, trim="model", seed=5)
    for name in names:
        assert torch.equal(found[f"language_{name}"], base[name] + expected["model"][name])
    again = (tmp_path / "out/README.md").read_text()
    assert "trim='model'," in again and "seed=5," in again


def test_another_dtype_is_that_of_everything(family, tmp_path):
    found = composed(family, tmp_path / "out", method="ties", dtype="float16")
    assert {t.dtype for t in found.values() if t.is_floating_point()} == {torch.float16}
    exact = composed(family, tmp_path / "exact", method="ties")
    assert all(torch.equal(t, exact[n].to(t.dtype)) for n, t in found.items())
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["dtype"] == config["text_config"]["dtype"] == "float16"
    model = OmniForConditionalGeneration.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == torch.float16


def test_the_whole_language_model_merges_by_the_method(family, tmp_path):
    base, name = load_file(Path(family.base, "model.safetensors")), "model.norm.weight"
    folders, change = {}, torch.linspace(0, 1, len(base[name]))
    for times, (modality, folder) in enumerate(family.folders.items(), 1):
        folders[modality] = shutil.copytree(folder, tmp_path / modality)
        tensors = load_file(folders[modality] / "model.safetensors")
        own = next(n for n in tensors if language_name(n) == name)
        tensors[own] += times * change
        save_file(tensors, folders[modality] / "model.safetensors", {"format": "pt"})
    models = SimpleNamespace(base=family.base, folders=folders)
    found = composed(models, tmp_path / "out", method="task_arithmetic", scope="all")
    linear = composed(models, tmp_path / "linear", method="task_arithmetic")
    torch.testing.assert_close(found["language_" + name], base[name] + 6 * change)
    torch.testing.assert_close(linear["language_" + name], base[name] + 2 * change)
    report = json.loads((tmp_path / "out/merge_report.json").read_text())
    assert report["scope"] == "all" and len(report["parameters"]) == len(base)
    assert report["parameters_kept"] == 0


def test_the_family_says_what_merges(family, tmp_path, monkeypatch):
    from optmerge_core.merging import families

    rule = r"model\.layers\.\d+\.mlp\..+\.weight"
    monkeypatch.setitem(families.FAMILIES, "only_mlp", rule)
    composed(family, tmp_path / "out", method="ties", family="only_mlp")
    report = json.loads((tmp_path / "out/merge_report.json").read_text())
    assert report["family"] == report["model_type"] == "only_mlp"
    assert len(report["parameters"]) == 6
    assert all(re.fullmatch(rule, record["name"]) for record in report["parameters"])
