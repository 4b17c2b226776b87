"""The tiny InternVL: real classes, lossless tokens, a processor that equals the fast path."""

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from optmerge_core.benchmark.models import build_model, build_processor, prompt
from optmerge_core.benchmark.tasks import TASKS, sample
from optmerge_core.benchmark.training import Collate, conversation


@pytest.fixture(scope="module")
def processor():
    return build_processor()


@pytest.mark.parametrize("level", ["grid", "caption", "easy", "full"])
@pytest.mark.parametrize("task", TASKS)
def test_answers_survive_tokens_and_none_is_unknown(processor, task, level):
    tokenizer = processor.tokenizer
    samples = [sample(task, "train", i, level) for i in range(30)]
    batch = Collate(processor)(samples)
    assert not (batch["input_ids"] == tokenizer.unk_token_id).any()
    for item, labels in zip(samples, batch["labels"], strict=True):
        answers = tokenizer.decode(labels[labels != -100]).split(tokenizer.eos_token)
        assert answers == [answer for _, answer, _ in item.turns] + [""]


def test_collate_equals_the_processor(processor):
    item = sample("Chart", "train", 3)
    batch = Collate(processor)([item])
    stock = processor(
        images=[Image.fromarray(item.image)], text=[prompt(item.question)], return_tensors="pt"
    )
    assert torch.equal(batch["pixel_values"], stock["pixel_values"])
    length = stock["input_ids"].shape[1]
    assert torch.equal(batch["input_ids"][:, :length], stock["input_ids"])
    assert (batch["labels"][:, :length] == -100).all()


def test_prompt_is_the_chat_template(processor):
    content = [{"type": "image"}, {"type": "text", "text": "how many ?"}]
    messages = [{"role": "user", "content": content}]
    templated = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert templated == prompt("how many ?")


def test_conversation_is_the_chat_template(processor):
    item = sample("VQA", "train", 0)
    messages = []
    for number, (question, answer, _) in enumerate(item.turns):
        image = [] if number else [{"type": "image"}]
        content = [*image, {"type": "text", "text": question}]
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    templated = processor.apply_chat_template(messages)
    block = "<img>" + 16 * "<IMG_CONTEXT>" + "</img>"
    assert templated.replace("<IMG_CONTEXT>", block) == "".join(conversation(item.turns))


def test_folder_opens_with_the_auto_classes_and_generates(processor, tmp_path):
    model = build_model(processor.tokenizer, seed=3)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    opened = AutoModelForImageTextToText.from_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    item = sample("VQA", "train", 0)
    inputs = again(
        images=[Image.fromarray(item.image)], text=[prompt(item.question)], return_tensors="pt"
    )
    with torch.no_grad():
        assert torch.equal(opened(**inputs).logits, model(**inputs).logits)
    tokens = opened.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert tokens.shape[1] > inputs["input_ids"].shape[1]


def test_the_seed_decides_every_weight(processor):
    first, again, other = (build_model(processor.tokenizer, seed=s) for s in (0, 0, 1))
    pairs = list(zip(first.parameters(), again.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert any(not torch.equal(a, c) for a, _, c in pairs)


def test_shipped_tokenizer_is_what_the_package_builds(processor):
    shipped = AutoProcessor.from_pretrained("data/benchmark/internvl/base").tokenizer
    assert shipped.get_vocab() == processor.tokenizer.get_vocab()
