"""All that PEFT trains with LoRA, read as PEFT merges it, or refused by name."""

import copy
import json
from functools import partial

import pytest
import torch
from lora import tiny_model
from merging import test_real_classes as real
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Qwen2ForCausalLM
from transformers.pytorch_utils import Conv1D

from optmerge_core import merge, merge_adapters, open_checkpoint
from optmerge_core.checkpoints.adapters import Adapter, lengthened
from optmerge_core.checkpoints.formats import CheckpointError
from optmerge_core.checkpoints.names import HEAD, PREFIX
from optmerge_core.checkpoints.open import open_expert
from optmerge_core.checkpoints.weights import InMemory, Weights

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
EXPERTS, HIDDEN, INNER = 3, 6, 4


class Experts(nn.Module):
    def __init__(self, turned: bool, inner: int):
        super().__init__()
        self.is_transposed = turned  # as transformers' classes say it

        def stack(rows: int, columns: int) -> nn.Parameter:
            shape = (columns, rows) if turned else (rows, columns)
            return nn.Parameter(torch.randn(EXPERTS, *shape))

        self.gate_up_proj, self.down_proj = stack(2 * inner, HIDDEN), stack(HIDDEN, inner)


class Net(nn.Module):
    """A module of each kind that LoRA adapts, of any use to nobody."""

    def __init__(self, turned: bool = False, inner: int = INNER):
        super().__init__()
        self.embed_tokens, self.norm = nn.Embedding(11, HIDDEN), nn.LayerNorm(HIDDEN)
        self.layers = nn.ModuleList([nn.ModuleDict(self.layer(turned, inner))])

    @staticmethod
    def layer(turned: bool, inner: int) -> dict[str, nn.Module]:
        return {
            "q_proj": nn.Linear(HIDDEN, 8),
            "image": nn.Conv2d(3, 4, (3, 2)),
            "point": nn.Conv2d(3, 4, 1),
            "sound": nn.Conv1d(3, 4, 2),
            "video": nn.Conv3d(2, 3, (1, 2, 2)),
            "c_attn": Conv1D(9, HIDDEN),
            "c_proj": Conv1D(HIDDEN, HIDDEN),
            "mlp": nn.ModuleDict({"experts": Experts(turned, inner)}),
        }


def make_net(**options) -> Net:
    torch.manual_seed(0)
    return Net(**options).double()


def train(net: nn.Module, folder, **settings):
    """PEFT's adapter of a model, every number of it moved at random."""
    net = get_peft_model(copy.deepcopy(net), LoraConfig(**{"r": 2, "lora_alpha": 3} | settings))
    generator = torch.Generator().manual_seed(1)
    for parameter in net.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data += (0.1 * noise).to(parameter.dtype)
    net.save_pretrained(folder)
    return net


def read(folder, base, kind: str | None = None) -> Adapter:
    if not isinstance(base, Weights):
        base = InMemory(base, {"model_type": kind, "tie_word_embeddings": False})
    return Adapter(open_checkpoint(folder, adapter=True), base)


def equal(ours: Weights, base: dict, expected: dict) -> None:
    """To what PEFT merges in float64; `changes` are what differs, and its task vectors exact."""
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (ours[name].double() - tensor).abs().max() < 1e-6, name
        assert ours.shape(name) == tensor.shape
        vector = ours.task_vector(name, base[name])
        if vector is not None:
            assert vector.dtype == torch.float32
            assert (vector.double() - (tensor - base[name])).abs().max() < 1e-6, name
    changed = {name for name, tensor in expected.items() if not torch.equal(tensor, base[name])}
    assert changed == set(ours.changes)


LAYERS = ["q_proj", "image", "point", "sound", "video", "c_attn", "c_proj", "embed_tokens"]
STACKS = ["experts.gate_up_proj", "mlp.experts.down_proj"]
KINDS = {
    "factors": {"target_modules": LAYERS},
    "rsLoRA": {"target_modules": LAYERS, "use_rslora": True, "alpha_pattern": {"image": 7}},
    "DoRA": {"target_modules": LAYERS, "use_dora": True},
    "bias of factors": {"target_modules": LAYERS[:-1], "lora_bias": True},
    "all biases": {"target_modules": LAYERS, "bias": "all"},
    "their biases": {"target_modules": LAYERS[:2], "bias": "lora_only"},
    "whole": {"target_modules": LAYERS[:2], "modules_to_save": ["norm", "embed_tokens", "video"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [7, 2]}},
    "experts": {"target_modules": ["image"], "target_parameters": STACKS},
    "no such name": {"target_modules": [], "target_parameters": [*STACKS, "experts.up_proj"]},
    "one of experts": {"target_modules": [], "target_parameters": STACKS[1:]},
    "ranks": {"target_parameters": STACKS, "rank_pattern": {"down_proj": 1}, "target_modules": []},
    "matrix": {"target_modules": ["image"], "target_parameters": ["q_proj.weight"]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_what_peft_merges(tmp_path, kind):
    net = make_net()
    train(net, tmp_path, **KINDS[kind])
    merged = PeftModel.from_pretrained(copy.deepcopy(net), tmp_path).merge_and_unload()
    base = net.state_dict()
    equal(read(tmp_path, base, "gpt2"), base, merged.state_dict())


@pytest.mark.parametrize(("kind", "turned"), [("gpt_oss", True), ("llama4", False)])
@pytest.mark.parametrize("inner", [INNER, HIDDEN])
def test_experts_lie_as_their_class_has_them(tmp_path, kind, turned, inner):
    """Where one expert's matrix is square, only the class tells; a sibling never is as well."""
    net, base = (make_net(turned=turned, inner=inner) for _ in range(2))
    train(net, tmp_path, target_modules=[], target_parameters=STACKS)
    merged = PeftModel.from_pretrained(net, tmp_path).merge_and_unload().state_dict()
    equal(read(tmp_path, base.state_dict(), kind), base.state_dict(), merged)


def one_by_one(tensors: dict) -> dict:
    """The experts' matrices as most published files have them."""
    found = {}
    for name, tensor in tensors.items():
        block, experts, kind = name.rpartition("experts.")
        parts = {"gate_up_proj": ["gate_proj", "up_proj"]}.get(kind, [kind])
        for number, matrix in enumerate(tensor if experts else []):
            pieces = zip(parts, matrix.chunk(len(parts)), strict=True)
            found |= {f"{block}experts.{number}.{part}.weight": x for part, x in pieces}
        if not experts:
            found[name] = tensor
    return found


def test_experts_of_a_base_that_stores_each(tmp_path):
    net = make_net()
    train(net, tmp_path, target_modules=["q_proj"], target_parameters=STACKS)
    base = one_by_one(copy.deepcopy(net.state_dict()))
    merged = PeftModel.from_pretrained(net, tmp_path).merge_and_unload().state_dict()
    ours = read(tmp_path, base)
    equal(ours, base, one_by_one(merged))
    assert len(ours.changes) == 1 + 3 * EXPERTS


@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_vl_moe"])
def test_experts_of_real_classes(tmp_path, family, original):
    """One file a matrix or one of all; the router, an attention and the embeddings beside them."""
    net = real.build(family)
    net.save_pretrained(tmp_path / "base", save_original_format=original)
    targets = {"target_modules": ["o_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}
    train(net, tmp_path / "a", **targets, target_parameters=[*STACKS, "gate.weight"])
    merged = PeftModel.from_pretrained(net, tmp_path / "a").merge_and_unload()
    merged.save_pretrained(tmp_path / "merged", save_original_format=original)
    base, expected = (open_checkpoint(tmp_path / name) for name in ("base", "merged"))
    equal(open_expert(tmp_path / "a", base), dict(base), dict(expected))


def test_a_conv1d_of_another_family_is_known_by_the_setting(tmp_path):
    net, base = make_net(), make_net().state_dict()
    train(net, tmp_path, target_modules=["c_attn", "c_proj"])
    assert json.loads((tmp_path / "adapter_config.json").read_text())["fan_in_fan_out"]
    merged = PeftModel.from_pretrained(net, tmp_path).merge_and_unload().state_dict()
    equal(read(tmp_path, base, "unheard of"), base, merged)


def test_doras_lengths_by_hand():
    weight, change = torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 4.0], [0.0, 1.0]])
    expected = torch.tensor([[6.0, 8.0], [0.0, 1.0]]) - weight  # lengths 5 and 2 to 10 and 1
    lengths = torch.tensor([10.0, 1.0])
    torch.testing.assert_close(lengthened(weight, change, lengths, turned=False), expected)
    torch.testing.assert_close(lengthened(weight.T, change.T, lengths, turned=True), expected.T)


def test_the_base_at_hand_is_not_read_again(tmp_path):
    class Once(InMemory):
        def __getitem__(self, name):
            raise AssertionError(f"{name} is read")

    net = make_net()
    train(net, tmp_path, target_modules=LAYERS, use_dora=True)
    base = net.state_dict()
    once, plain = (read(tmp_path, x(base, {"model_type": "gpt2"})) for x in (Once, InMemory))
    for name in plain.changes.keys() & base.keys():
        assert torch.equal(once.task_vector(name, base[name]), plain.task_vector(name))


@pytest.mark.parametrize("kind", KINDS)
def test_merge_adapters_refuses_what_no_factors_are(tmp_path, kind):
    named = {"factors": "embeddings", "rsLoRA": "a convolution", "DoRA": "DoRA's lengths"}
    named |= {
        "bias of factors": "lora_bias",
        "whole": r"new value .*: embed_tokens\.",
        "tokens": "new value",
    }
    named |= {
        "all biases": r"a parameter's new value .*layers\.0\.",
        "their biases": "a parameter's new value",
    }
    train(make_net(), tmp_path / "a", **KINDS[kind])
    message = (
        rf"^expert a has more than .*{named.get(kind, 'target_parameters')}.*merge with the base"
    )
    with pytest.raises(CheckpointError, match=message):
        merge_adapters({"a": tmp_path / "a"}, tmp_path / "out", method="weight_average")
    assert not (tmp_path / "out").exists()


TIED = {
    "embeddings apart": {"modules_to_save": ["embed_tokens"]},
    "both apart": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "factors of embeddings": {"target_modules": ["embed_tokens", "v_proj"]},
    "factors of both": {"target_modules": ["embed_tokens", "lm_head"], "use_dora": True},
    "embeddings together": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "factors together": {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    "rows of tokens": {"trainable_token_indices": [1, 39]},
}


@pytest.mark.parametrize("kind", TIED)
def test_a_tied_head_is_what_was_trained(tmp_path, kind):
    """PEFT's own merge changes one with the other, or twice: another model than the one trained."""
    tiny_model().save_pretrained(tmp_path / "base")
    settings = {"target_modules": ["q_proj"]} | TIED[kind]
    trained = train(tiny_model(), tmp_path / "adapter", **settings).eval()
    experts, ids = {"a": tmp_path / "adapter"}, torch.arange(40)[None]
    report = merge(tmp_path / "base", experts, tmp_path / "all", method="ties", scope="all",
                   method_options={"density": 1.0})  # fmt: skip
    together = "together" in kind or kind == "rows of tokens"
    assert (HEAD in {record["name"] for record in report.parameters}) != together
    ours = Qwen2ForCausalLM.from_pretrained(tmp_path / "all")
    assert ours.config.tie_word_embeddings == together
    with torch.no_grad():
        expected = trained(ids).logits
        torch.testing.assert_close(ours(ids).logits, expected, atol=1e-5, rtol=1e-4)


def test_a_larger_vocabulary_is_kept_out_with_a_notice(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    larger = tiny_model()
    larger.resize_token_embeddings(42)
    saved = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    train(larger, tmp_path / "adapter", **saved)
    experts = {"a": tmp_path / "adapter"}
    with pytest.warns(UserWarning) as told:
        merge(tmp_path / "base", experts, tmp_path / "out", method="weight_average")
    texts = " ".join(str(warning.message) for warning in told)
    assert "expert a adapts 2 parameters outside the merge" in texts
    assert "expert a has 2 embeddings more than the base" in texts
    base, merged = open_checkpoint(tmp_path / "base"), open_checkpoint(tmp_path / "out")
    differ = {name for name in base if not torch.equal(base[name], merged[name])}
    assert differ == {f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)}


def changed(folder, tensors=lambda tensors: tensors, **settings) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({n: t.contiguous() for n, t in tensors(load_file(path)).items()}, path)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def without(part: str, tensors: dict) -> dict:
    return {name: tensor for name, tensor in tensors.items() if part not in name}


def with_(name: str, shape: tuple, tensors: dict) -> dict:
    return tensors | {f"{PREFIX}{name}": torch.zeros(shape)}


Q, NORM = "layers.0.q_proj", "norm.weight"


@pytest.mark.parametrize(
    ("kind", "edit", "settings", "message"),
    [
        ("DoRA", partial(without, "proj.lora_magn"), {}, "no numbers of magnitude or bias"),
        ("DoRA", dict, {"use_dora": False}, r"outputs and \[\d\] numbers of .* use_dora"),
        ("bias of factors", partial(without, "q_proj.lora_B.bias"), {}, "8 outputs and no numb"),
        ("whole", partial(without, "norm"), {}, "norm of modules_to_save is not in it"),
        ("whole", partial(with_, f"{Q}.weight", (8, 6)), {}, "weight is changed in two ways"),
        ("whole", dict, {"modules_to_save": ["q_proj"]}, "has factors, and .* leaves it out"),
        ("tokens", dict, {"trainable_token_indices": [1]}, r"\(1\) .* say: \(2, 6\) of \(11, 6\)"),
        ("tokens", dict, {"trainable_token_indices": [1, 11]}, r"other rows than .* \(2\)"),
        ("tokens", dict, {"trainable_token_indices": [1, 1]}, "is not token numbers"),
        ("one of experts", dict, {"r": 3}, r"of 0 of the base's \['down_proj'\] by target_para"),
        ("experts", dict, {"init_lora_weights": "pissa"}, "of 0 of the base's"),
        ("factors", partial(with_, f"{Q}.lora_E", (2, 1)), {}, "is nothing that LoRA trains"),
        ("factors", partial(with_, "lora_A.weight", (2, 1)), {}, "is nothing that LoRA trains"),
    ],
)  # fmt: skip
def test_what_does_not_belong_together_is_refused(tmp_path, kind, edit, settings, message):
    train(make_net(), tmp_path, **KINDS[kind])
    changed(tmp_path, edit, **settings)
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path, make_net().state_dict(), "gpt2")


def test_a_bias_that_the_base_has_not_is_refused(tmp_path):
    train(make_net(), tmp_path, target_modules=["q_proj"], lora_bias=True)
    base = without("q_proj.bias", make_net().state_dict())
    with pytest.raises(CheckpointError, match=r"q_proj\.bias stands for none of its parameters"):
        read(tmp_path, base)


def test_a_parameter_that_the_base_has_not_is_a_notice(tmp_path):
    """As of a classifier, which no generating model has."""
    tiny_model().save_pretrained(tmp_path / "base")
    train(tiny_model(), tmp_path / "adapter", target_modules=["q_proj"])
    changed(tmp_path / "adapter", partial(with_, "score.weight", (2, 24)))
    opened = open_expert(tmp_path / "adapter", open_checkpoint(tmp_path / "base"))
    assert opened["score.weight"].shape == (2, 24) == opened.shape("score.weight")
    experts = {"a": tmp_path / "adapter"}
    with pytest.warns(match=r"outside the merge; the base's are kept \(score\.weight\)"):
        merge(tmp_path / "base", experts, tmp_path / "out", method="weight_average")


def test_copies_that_peft_saves_beside_a_whole_module(tmp_path):
    net, base = make_net(), make_net().state_dict()
    train(net, tmp_path, **KINDS["whole"])
    expected = dict(read(tmp_path, base, "gpt2"))
    copies = {f"original_module.{NORM[5:]}": (HIDDEN,), f"modules_to_save.{NORM[5:]}": (HIDDEN,)}
    for name, shape in copies.items():
        changed(tmp_path, partial(with_, f"norm.{name}", shape))
    ours = read(tmp_path, base, "gpt2")
    assert all(torch.equal(ours[name], tensor) for name, tensor in expected.items())
