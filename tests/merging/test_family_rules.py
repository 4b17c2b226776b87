"""Each of these families' real class, tiny: saved, merged, opened again, and asked, by sound too.

What merges is counted against the tree of modules: every linear layer of the language model, and
nothing else. Configs are in `tiny_families.py`.
"""

import re
import warnings
from operator import attrgetter

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_families import (
    AUDIO_END,
    AUDIO_START,
    AUDIO_TOKEN,
    FAMILIES,
    IMAGE,
    Family,
    build,
    class_of,
    save,
)
from torch import nn
from transformers import PreTrainedModel

from optmerge_core.checkpoints.open import open_checkpoint, open_expert
from optmerge_core.merging.checks import not_finite
from optmerge_core.merging.families import mergeable
from optmerge_core.merging.merge import merge

OMNI = [name for name, family in FAMILIES.items() if family.speech]
WEIGHTS = "model.safetensors"


def linear_parameters(model: PreTrainedModel, family: Family, speech: bool = False) -> set[str]:
    """Names in memory of the weights of linear layers, of experts and of routers."""
    places = [family.language, *(family.speech if speech else ())]
    parts = [attrgetter(x)(model) if x else model.get_decoder() for x in places]
    found = set()
    for module in (module for part in parts for module in part.modules()):
        if isinstance(module, nn.Linear):
            found.add(id(module.weight))
        elif re.search("Experts|Router", type(module).__name__):
            own = module.named_parameters(recurse=False)
            found |= {id(p) for n, p in own if p.ndim > 1 and not n.endswith("bias")}
    return {name for name, parameter in model.named_parameters() if id(parameter) in found}


def on_disk(folder) -> dict[str, torch.Tensor]:
    return {n: t for x in folder.glob("*.safetensors") for n, t in load_file(x).items()}


def answer(model: PreTrainedModel, family: Family) -> torch.Tensor:
    """Logits of a prompt with the picture, if the family has one here."""
    ids = torch.tensor([[IMAGE] * family.tokens + [20, 21]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | family.inputs
    with torch.no_grad():
        return getattr(model, "thinker", model)(**inputs).logits


def answer_to_sound(model: PreTrainedModel, family: Family, sign: float = 1.0) -> torch.Tensor:
    """Logits of the last token after a sound, the family's, or that with the other sign."""
    count, inputs = family.sound
    ids = torch.tensor([[AUDIO_START, *[AUDIO_TOKEN] * count, AUDIO_END, 20, 21]])
    inputs = {k: sign * x if x.is_floating_point() else x for k, x in inputs.items()}
    with torch.no_grad():
        model = getattr(model, "thinker", model)
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs).logits[0, -1]


def check(name: str, model: PreTrainedModel, experts: list, out, report, speech: bool) -> None:
    """By hand: base + (ocr - base) + (chart - base) in every linear layer, else the base's."""
    family, cls = FAMILIES[name], class_of(FAMILIES[name])
    linear = linear_parameters(model, family, speech)
    start, ocr, chart = (x.state_dict() for x in (model, *experts))
    if name == "qwen2_5_omni":  # whose class cannot tell what it loads
        again = cls.from_pretrained(out)
    else:
        again, info = cls.from_pretrained(out, output_loading_info=True)
        assert not any(info.values()), info
    state = again.state_dict()
    assert state.keys() == start.keys() and len(linear) >= 8
    for own, tensor in state.items():
        expected = start[own]
        if own in linear:
            expected = expected + ((ocr[own] - start[own]) + (chart[own] - start[own]))
        assert torch.equal(tensor, expected), own
        assert own not in linear or not torch.equal(tensor, start[own]), own
    base, merged = on_disk(out.parent / "base"), on_disk(out)
    assert merged.keys() == base.keys()
    changed = {own for own in base if not torch.equal(merged[own], base[own])}
    assert changed == {record["name"] for record in report.parameters}
    entries = sum(base[own].numel() for own in changed)
    assert entries == sum(start[own].numel() for own in linear)
    assert torch.isfinite(answer(again.eval(), family)).all()
    if family.sound[0]:
        heard = answer_to_sound(again, family)
        assert torch.isfinite(heard).all() and not torch.equal(
            heard, answer_to_sound(model, family)
        )
        assert not torch.equal(heard, answer_to_sound(again, family, sign=-1.0))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_linear_layer_of_the_language_model_merges_and_nothing_else(tmp_path, name):
    model, experts = build(name), [build(name, 1), build(name, 2)]
    folders = [save(x, tmp_path / place) for x, place in zip(experts, ("ocr", "b"), strict=True)]
    assert (FAMILIES[name].model_type or name) == model.config.model_type
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of an unknown family, or of tensors without a known name
        report = merge(
            save(model, tmp_path / "base"), dict(zip("ab", folders, strict=True)),
            tmp_path / "out", method="task_arithmetic",
        )  # fmt: skip
    check(name, model, experts, tmp_path / "out", report, speech=False)
    shapes = {own: tuple(x.shape) for own, x in on_disk(save(model, tmp_path / "m", False)).items()}
    in_memory = mergeable(shapes, model.config.model_type)  # by the names in memory, the same
    assert set(in_memory) == linear_parameters(model, FAMILIES[name])


@pytest.mark.filterwarnings("ignore:expert . has other names")
@pytest.mark.parametrize("name", OMNI)
def test_what_speaks_merges_if_asked(tmp_path, name):
    model, experts = build(name), [build(name, 1), build(name, 2)]
    report = merge(
        save(model, tmp_path / "base"), dict(zip("ab", experts, strict=True)), tmp_path / "out",
        method="task_arithmetic", scope="speech",
    )  # fmt: skip
    check(name, model, experts, tmp_path / "out", report, speech=True)
    assert report.recipe()["scope"] == "speech"


@pytest.mark.parametrize("name", OMNI)
def test_a_thinker_by_itself_is_an_expert_of_the_whole(tmp_path, name):
    """As fine-tuned thinkers are saved; the talker it lacks is the base's, and cannot be asked."""
    model, expert = build(name), build(name, 1)
    base, alone = save(model, tmp_path / "base"), save(expert.thinker, tmp_path / "alone")
    with pytest.warns() as notices:
        merge(base, {"a": alone}, tmp_path / "out", method="task_arithmetic")
    names, outside = [str(notice.message) for notice in notices]
    assert "expert a has other names for" in names
    assert re.search(r"parameters outside the merge differ.*\((talker|code2wav)\.", outside)
    same = save(expert, tmp_path / "same")
    merge(base, {"a": same}, tmp_path / "whole", method="task_arithmetic")
    out, whole = on_disk(tmp_path / "out"), on_disk(tmp_path / "whole")
    assert all(torch.equal(out[own], whole[own]) for own in whole)
    with pytest.raises(ValueError, match=f"scope 'speech'.*'{name}_thinker', has no talker"):
        merge(save(model.thinker, tmp_path / "b"), {"a": alone}, tmp_path / "o", scope="speech")


@pytest.mark.parametrize("name", OMNI)
def test_an_adapter_made_on_the_text_model_alone_is_the_thinkers(tmp_path, name):
    """The talker has layers that end alike."""
    model = build(name)
    base = save(model, tmp_path / "base")
    text = get_peft_model(model.thinker.get_decoder(), LoraConfig(target_modules=["q_proj"]))
    text.save_pretrained(tmp_path / "adapter")
    expert = open_expert(tmp_path / "adapter", open_checkpoint(base))
    assert sorted(expert.changes) == [
        f"thinker.model.layers.{layer}.self_attn.q_proj.weight" for layer in range(2)
    ]


def test_a_scalar_may_be_infinite_and_nothing_else():
    """Bounds of what Gemma-4's audio tower clips are saved so; its merge is tested above."""
    infinity = float("inf")
    assert not not_finite(torch.tensor(infinity)) and not_finite(torch.tensor([infinity]))
    assert not_finite(torch.tensor(float("nan")))


@pytest.mark.parametrize("owner", ["base", "ocr"])
@pytest.mark.parametrize("name", ["gemma3n", "gemma4"])
def test_keys_and_values_that_no_layer_reads_are_the_bases(tmp_path, monkeypatch, name, owner):
    """Published files have them in layers that share an earlier one's, transformers 5 has not."""
    text = FAMILIES[name].config["text_config"] | {
        "num_hidden_layers": 4, "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    }  # fmt: skip
    config = FAMILIES[name].config | {"text_config": text}
    monkeypatch.setitem(FAMILIES, name, FAMILIES[name]._replace(config=config))
    model, expert = build(name), build(name, 1)
    folders = {"base": save(model, tmp_path / "base"), "ocr": save(expert, tmp_path / "ocr")}
    file = folders[owner] / WEIGHTS
    more = "model.language_model.layers.3.self_attn.k_proj.weight"
    save_file(load_file(file) | {more: torch.ones(8, 16)}, file, {"format": "pt"})
    with pytest.warns(match=f"{more}.*no such parameter|differ in name or shape.*{more}"):
        merge(folders["base"], {"a": folders["ocr"]}, tmp_path / "out", method="task_arithmetic")
    cls = class_of(FAMILIES[name])
    again, info = cls.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    linear = linear_parameters(model, FAMILIES[name])
    start, moved = model.state_dict(), expert.state_dict()
    for own, tensor in again.state_dict().items():
        expected = start[own] + (moved[own] - start[own]) if own in linear else start[own]
        assert torch.equal(tensor, expected), own
    assert (more in on_disk(tmp_path / "out")) == (owner == "base")
