"""The tiny models: real classes, lossless tokens, a processor that equals the fast path."""

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from optmerge_core import open_checkpoint
from optmerge_core.benchmark.evaluator import EmbeddedEvaluator, evaluator_for
from optmerge_core.benchmark.models.registry import EMBEDDED_FAMILIES, build_model, build_processor
from optmerge_core.benchmark.tasks.samples import TASKS, make_dataset, sample
from optmerge_core.benchmark.training.loop import Collate
from optmerge_core.merging.families import mergeable


@pytest.fixture(scope="module", params=list(EMBEDDED_FAMILIES))
def family(request):
    return request.param


@pytest.fixture(scope="module")
def processor(family):
    return build_processor(family)


@pytest.mark.parametrize("level", ["grid", "caption", "easy", "medium", "full"])
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
    items = [sample("Chart", "train", i) for i in range(3)]
    batch = Collate(processor)(items)
    for row, item in enumerate(items):
        stock = processor(
            images=[Image.fromarray(item.image)],
            text=[processor.prompt(item.question)],
            return_tensors="pt",
        )
        assert set(stock) - {"attention_mask"} == set(batch) - {"labels"}
        pixels = batch["pixel_values"].chunk(3)[row]
        assert torch.equal(pixels, stock["pixel_values"])
        length = stock["input_ids"].shape[1]
        for name in ("input_ids", "mm_token_type_ids"):
            if name in stock:
                assert torch.equal(batch[name][row, :length], stock[name][0])
        assert (batch["labels"][row, :length] == -100).all()
        if "image_grid_thw" in stock:
            assert torch.equal(batch["image_grid_thw"][[row]], stock["image_grid_thw"])


def test_prompt_is_the_chat_template(processor):
    content = [{"type": "image"}, {"type": "text", "text": "how many ?"}]
    messages = [{"role": "user", "content": content}]
    templated = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert templated == processor.prompt("how many ?")


def test_conversation_is_the_chat_template(processor):
    item = sample("VQA", "train", 0)
    messages = []
    for number, (question, answer, _) in enumerate(item.turns):
        image = [] if number else [{"type": "image"}]
        content = [*image, {"type": "text", "text": question}]
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    templated = processor.apply_chat_template(messages)
    expanded = templated.replace(processor.placeholder, processor.block)
    assert expanded == "".join(processor.conversation(item.turns))
    assert processor.block.count(processor.image_token) == 16


def test_folder_opens_with_the_auto_classes_and_generates(processor, family, tmp_path):
    model = build_model(processor, family, seed=3)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    opened = AutoModelForImageTextToText.from_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    item = sample("VQA", "train", 0)
    inputs = again(
        images=[Image.fromarray(item.image)],
        text=[again.prompt(item.question)],
        return_tensors="pt",
    )
    with torch.no_grad():
        assert torch.equal(opened(**inputs).logits, model(**inputs).logits)
    tokens = opened.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert tokens.shape[1] > inputs["input_ids"].shape[1]


def test_evaluator_answers_as_generate_does(processor, family, tmp_path):
    model = build_model(processor, family, seed=3).eval()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    data = make_dataset("VQA", "validation", 6)
    table = evaluator_for(tmp_path, data).answer()
    for index, item in enumerate(data):
        inputs = processor(
            images=[item["image"]], text=[processor.prompt(item["question"])], return_tensors="pt"
        )
        tokens = model.generate(
            **inputs, max_new_tokens=EmbeddedEvaluator.max_new_tokens, do_sample=False
        )
        text = processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert table.loc[index, "prediction"] == text


def test_language_model_s_linear_layers_merge(processor, family, tmp_path):
    build_model(processor, family).save_pretrained(tmp_path)
    names = mergeable(open_checkpoint(tmp_path).shapes(), family)
    assert len(names) == 4 * 7 and all(".layers." in name for name in names)


def test_the_seed_decides_every_weight(processor, family):
    first, again, other = (build_model(processor, family, seed=s) for s in (0, 0, 1))
    pairs = list(zip(first.parameters(), again.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert any(not torch.equal(a, c) for a, _, c in pairs)


def test_shipped_tokenizer_is_what_the_package_builds():
    shipped = AutoProcessor.from_pretrained("data/benchmark/internvl/base").tokenizer
    assert shipped.get_vocab() == build_processor("internvl").tokenizer.get_vocab()
