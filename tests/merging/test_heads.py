"""A head of its own under a config that ties it: merged models compute what transformers loads."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from optmerge_core import load_plan, merge, plan_merge
from optmerge_core.merging.experts import open_models
from optmerge_core.merging.merge import join, merge_part

TEXT = {
    "vocab_size": 24, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": 0, "tie_word_embeddings": True,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": [28, 28], "patch_size": [7, 7],
}  # fmt: skip
PROMPT = torch.tensor([[3, 7, 5, 9]])


def qwen2():
    return Qwen2ForCausalLM(Qwen2Config(**TEXT))


def internvl():
    text = {"model_type": "qwen2", **TEXT}
    config = InternVLConfig(vision_config=VISION, text_config=text, image_token_id=2)
    return InternVLForConditionalGeneration(config)


def save(make, folder, seed, head=None):
    """A tied model, whose head is of its own values in the file, a copy, or not there."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        make().save_pretrained(folder)
        own = torch.randn(24, 16) / 10
    path = folder / "model.safetensors"
    tensors = load_file(path)
    (embeddings,) = (name for name in tensors if name.endswith("embed_tokens.weight"))
    if head is not None:
        prefix = "language_model." if embeddings.startswith("language_model.") else ""
        tensors[f"{prefix}lm_head.weight"] = own if head == "own" else tensors[embeddings].clone()
        save_file(tensors, path, metadata={"format": "pt"})
    return folder


def loaded(folder, make):
    return type(make()).from_pretrained(folder).eval()


def state(model):
    """Parameters by their names in memory, head and embeddings each with its own."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.filterwarnings("ignore:.*is not the embeddings, which config.json ties it to")
@pytest.mark.parametrize("make", [qwen2, internvl])
@pytest.mark.parametrize(
    "heads", [(None, "own", None), ("own", None, "copy"), ("copy", "own", "own"), ("own",) * 3]
)
def test_logits_are_those_of_a_state_dict_made_by_hand(tmp_path, make, heads):
    base, *experts = (
        save(make, tmp_path / name, seed, head)
        for seed, (name, head) in enumerate(zip(("base", "a", "b"), heads, strict=True))
    )
    with torch.no_grad():
        start, *others = (state(loaded(folder, make)) for folder in (base, *experts))
        expected = {x: start[x] + 0.3 * sum(e[x] - start[x] for e in others) for x in start}
        merge(
            base, dict(zip("ab", experts, strict=True)), tmp_path / "out",
            method="task_arithmetic", scope="all", scaling_coefficient=0.3,
        )  # fmt: skip
        model = loaded(tmp_path / "out", make)
        by_hand = make()
        by_hand.lm_head.weight = torch.nn.Parameter(torch.zeros(24, 16))
        by_hand.load_state_dict(expected)
        logits = by_hand.eval()(PROMPT).logits
        torch.testing.assert_close(model(PROMPT).logits, logits)
        tied = by_hand.get_input_embeddings().weight
        by_hand.lm_head.weight = tied
        assert (by_hand(PROMPT).logits - logits).abs().max() > 0.01  # what dropping the heads gives
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert config.get("text_config", config)["tie_word_embeddings"] is False
    assert {**config, "tie_word_embeddings": 0, "text_config": 0} == {
        **json.loads((base / "config.json").read_text()), "tie_word_embeddings": 0, "text_config": 0
    }  # fmt: skip


def test_the_notice_says_whose_head_and_a_plan_in_parts_gives_the_same(tmp_path):
    base = save(qwen2, tmp_path / "base", 0)
    experts = {x: save(qwen2, tmp_path / x, i, "own") for i, x in enumerate("ab", 1)}
    settings = {"method": "ties", "scope": "all"}
    with pytest.warns() as notices:
        merge(base, experts, tmp_path / "out", **settings)
    assert [str(notice.message) for notice in notices] == [
        "expert a and expert b: lm_head.weight is not the embeddings, which config.json ties it "
        "to; the merged model's is stored apart, and its config.json says so"
    ]
    with pytest.warns(match="is not the embeddings"):
        plan = plan_merge(base, experts, tmp_path / "parts", **settings, max_part_size="2KB")
        plan = load_plan(plan.save(tmp_path / "plan.json"))
        for part in range(len(plan.parts)):
            merge_part(plan, part)
        join(plan)
    one, other = tmp_path / "out", tmp_path / "parts"
    for name in ("model.safetensors", "config.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes()


def test_the_papers_scope_keeps_the_bases_head_and_config(tmp_path, recwarn):
    base = save(qwen2, tmp_path / "base", 0)
    merge(base, {"a": save(qwen2, tmp_path / "a", 1, "own")}, tmp_path / "out", method="ties")
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    config = (tmp_path / "out" / "config.json").read_bytes()
    assert config == (base / "config.json").read_bytes()
    assert not open_models(base, {"a": tmp_path / "a"}).untied
