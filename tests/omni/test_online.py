"""Online composition: every kind of token through its own weights."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from specialists import WORDS, prompt
from torch.nn.functional import linear

from optmerge_core.benchmark.training.omni import decouple
from optmerge_core.checkpoints.open import open_checkpoint
from optmerge_core.merging.families import mergeable
from optmerge_core.omni import OmniForConditionalGeneration, compose
from optmerge_core.omni.online import RoutedLinear, online_weights, route
from optmerge_core.omni.specialists import LanguageModel, open_specialist


@pytest.fixture
def omni(family, tmp_path):
    compose(family.base, family.folders, tmp_path / "omni", method="weight_average")
    return OmniForConditionalGeneration.from_pretrained(tmp_path / "omni").eval()


@pytest.fixture(scope="module")
def weights(family):
    """Modality (or "base") -> name -> weight of the linear layers."""
    base = LanguageModel(open_checkpoint(family.base))
    names = mergeable({n: base.shape(n) for n in base}, "llama")
    found = {"base": {n: base[n] for n in names}}
    for modality, folder in family.folders.items():
        own = open_specialist(folder).language_model
        found[modality] = {n: own[n] for n in names}
    return found


def specialists_of(weights):
    return {kind: own for kind, own in weights.items() if kind != "base"}


def test_each_token_meets_its_own_matrix_by_hand():
    """Kinds 0, 2, 0 with the matrices [1 0], [5 5], [0 1] on the rows of an identity."""
    matrices = [torch.tensor([[1.0, 0.0]]), torch.tensor([[5.0, 5.0]]), torch.tensor([[0.0, 1.0]])]
    layer = RoutedLinear(matrices, torch.tensor([10.0]), lambda: torch.tensor([[0, 2, 0]]))
    inputs = torch.tensor([[[3.0, 4.0], [3.0, 4.0], [7.0, 8.0]]])
    assert layer(inputs).flatten().tolist() == [13.0, 14.0, 17.0]


@torch.no_grad()
def test_the_kinds_of_a_prompts_tokens(family, omni):
    ids = prompt("video", "vision")
    chosen = {m: family.inputs[m] for m in ("vision", "video")}
    omni.embed(ids, chosen)
    expected = torch.zeros_like(ids)
    kinds = ["text", *omni.specialists]
    expected[ids == WORDS] = kinds.index("vision")
    expected[ids == WORDS + 2] = kinds.index("video")
    assert torch.equal(omni.token_kinds, expected)
    omni.embed(torch.tensor([[4, 5]]))
    assert torch.equal(omni.token_kinds, torch.zeros(1, 2, dtype=torch.long))


@torch.no_grad()
def test_equal_weights_for_all_kinds_are_the_model_itself(family, omni, weights):
    ids = prompt(*family.inputs)
    given = {"input_ids": ids, "modality_inputs": family.inputs}
    before = omni(**given).logits, omni.generate(**given, max_new_tokens=4, do_sample=False)
    mean = online_weights(specialists_of(weights))["text"]
    route(omni, {kind: mean for kind in ("text", *family.inputs)})
    torch.testing.assert_close(omni(**given).logits, before[0], atol=1e-5, rtol=0)
    assert torch.equal(omni.generate(**given, max_new_tokens=4, do_sample=False), before[1])


def test_online_weights_by_hand():
    own = {"vision": {"w": torch.tensor([1.0])}, "audio": {"w": torch.tensor([3.0])}}
    naive = online_weights(own)
    assert naive == {"text": {"w": torch.tensor([2.0])}, **own}
    text = {"vision": {"w": torch.tensor([10.0])}, "audio": {"w": torch.tensor([20.0])}}
    assert online_weights(own, text) == {"text": {"w": torch.tensor([15.0])}, **own}


@torch.no_grad()
def test_averaged_outputs_are_averaged_weights(weights):
    """Why NaiveMC differs from a weight average only by keeping tokens apart."""
    inputs = torch.randn(3, 5, 32)
    stack = [own["model.layers.0.mlp.up_proj.weight"] for own in specialists_of(weights).values()]
    outputs = torch.stack([linear(inputs, w) for w in stack]).mean(0)
    torch.testing.assert_close(linear(inputs, torch.stack(stack).mean(0)), outputs)


@torch.no_grad()
@pytest.mark.parametrize("modality", ["vision", "audio", "video"])
def test_naive_composition_of_one_specialist_is_itself(family, tmp_path, weights, modality):
    compose(family.base, {modality: family.folders[modality]}, tmp_path / "one")
    model = OmniForConditionalGeneration.from_pretrained(tmp_path / "one").eval()
    route(model, online_weights({modality: weights[modality]}))
    ids, inputs = prompt(modality, ids=(WORDS, WORDS, WORDS + 1)), family.inputs[modality]
    expected = family.models[modality](input_ids=ids, **inputs).logits
    logits = model(input_ids=ids, modality_inputs={modality: inputs}).logits
    torch.testing.assert_close(logits, expected[..., : logits.shape[-1]], atol=1e-5, rtol=0)


@torch.no_grad()
def test_generation_with_and_without_a_cache_agree(family, omni, weights):
    route(omni, online_weights(specialists_of(weights)))
    given = {"input_ids": prompt(*family.inputs), "modality_inputs": family.inputs}
    given |= {"suppress_tokens": [WORDS, WORDS + 1, WORDS + 2]}  # random weights say anything
    answers = [
        omni.generate(**given, max_new_tokens=5, do_sample=False, use_cache=cache)
        for cache in (True, False)
    ]
    assert torch.equal(*answers)


@torch.no_grad()
def test_an_adapter_for_features_and_one_for_text(family, tmp_path, weights):
    """A decoupled specialist is the routed model with its two adapters' weights."""
    from optmerge_core.benchmark.training.loop import save

    torch.manual_seed(3)
    model = type(family.models["vision"]).from_pretrained(family.folders["vision"])
    adapter = {"r": 4, "target_modules": r".*language_model\.layers\..*_proj"}
    own = LoraConfig(**adapter, modules_to_save=["multi_modal_projector"])
    model = decouple(get_peft_model(model, own), LoraConfig(**adapter), WORDS).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            assert parameter.requires_grad
            parameter.copy_((0.1 * torch.randn_like(parameter)).half())
        if "lora_A" in name:
            parameter.copy_(parameter.half())
    ids, inputs = prompt("vision"), family.inputs["vision"]
    expected = model(input_ids=ids, **inputs).logits
    save(model, None, tmp_path / "two", family.folders["vision"])
    opened = {
        kind: open_specialist(tmp_path / "two" / folder).language_model
        for kind, folder in {"vision": "", "text": "text"}.items()
    }
    named = {kind: {n: lm[n] for n in weights["base"]} for kind, lm in opened.items()}
    assert all((named["text"][n] - named["vision"][n]).norm() > 0.1 for n in weights["base"])
    compose(family.base, {"vision": tmp_path / "two"}, tmp_path / "omni")
    omni = OmniForConditionalGeneration.from_pretrained(tmp_path / "omni").eval()
    logits = route(omni, named)(input_ids=ids, modality_inputs={"vision": inputs}).logits
    torch.testing.assert_close(logits, expected[..., : logits.shape[-1]], atol=1e-4, rtol=0)


def test_what_does_not_fit_is_refused(omni, weights):
    every = online_weights(specialists_of(weights))
    with pytest.raises(
        ValueError, match="weights for text, vision; needed: text, audio, video, vision"
    ):
        route(omni, {kind: every[kind] for kind in ("text", "vision")})
    name = "model.layers.0.mlp.up_proj.weight"
    fewer = {n: w for n, w in every["audio"].items() if n != name}
    with pytest.raises(ValueError, match=f"audio: {name} is not given for every kind of token"):
        route(omni, every | {"audio": fewer})
    wrong = every["video"] | {name: torch.zeros(3, 3)}
    message = rf"video: {name} has shape \(3, 3\), the model's \(48, 32\)"
    with pytest.raises(ValueError, match=message):
        route(omni, every | {"video": wrong})
    norm = {kind: {"model.layers.0.input_layernorm.weight": torch.ones(32)} for kind in every}
    with pytest.raises(ValueError, match="is the weight of a LlamaRMSNorm, not a linear layer"):
        route(omni, norm)
