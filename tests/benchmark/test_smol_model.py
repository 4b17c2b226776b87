"""The model of the study smol: SmolLM2's own words, a tower before them, and how both learn.

SmolLM2 itself, which takes seconds to load, only speaks; the rest is tried with a small Llama.
"""

import hashlib
import json
from functools import partialmethod
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, LlamaConfig, LlamaForCausalLM

from optmerge_core.benchmark.models import smol
from optmerge_core.benchmark.models.internvl import TOKENS
from optmerge_core.benchmark.tasks.english import lettering, writing
from optmerge_core.benchmark.tasks.english.drawing import CELLS, reserved
from optmerge_core.benchmark.tasks.english.samples import sample
from optmerge_core.benchmark.training import build, chat, tower
from optmerge_core.benchmark.training.loop import Collate, save
from optmerge_core.benchmark.training.smol import adapted, load_sight, save_sight, sight
from optmerge_core.checkpoints.open import open_checkpoint, open_expert

LAYERS = 2
TEXTS = [
    "The quick brown fox jumps over 12 lazy dogs, doesn't it?",
    "naïve café: £3.50 at 12:45\n\n\tdef f(x): return x**2  # ok",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "  two  spaces, a box 12 30 48 75, 日本 🙂",
]


@pytest.fixture(scope="module")
def own():
    return smol.original_tokenizer()


@pytest.fixture(scope="module")
def processor():
    return smol.build_processor()


@pytest.fixture(scope="module")
def llama():
    """A Llama of two layers that knows SmolLM2's words, and ends otherwise."""
    config = LlamaConfig(
        vocab_size=len(smol.build_tokenizer()),
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        eos_token_id=5,
    )
    torch.manual_seed(7)
    return LlamaForCausalLM(config)


@pytest.fixture
def small(llama, monkeypatch):
    """Whatever is built has that language model and a small tower: seed -> model."""
    build_model = smol.build_model

    def build(tokenizer, seed=0):
        return build_model(tokenizer, seed, width=16, layers=1)

    monkeypatch.setattr(smol, "language_model", lambda: llama)
    monkeypatch.setattr(smol, "build_model", build)
    return lambda seed=0: build(smol.build_tokenizer(), seed)


@pytest.fixture
def chatty(small):
    """The small model with factors on its language model."""
    return adapted(small(), rank=2, seed=0)


def wake(peft):
    """Give the factors, which begin at zero, something to say."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.slow
def test_it_is_smollm2_that_speaks():
    model, tokenizer = smol.language_model(), smol.build_tokenizer()
    assert model.config.num_hidden_layers == 30 and model.num_parameters() == 134_515_008
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    question = [{"role": "user", "content": "What is the capital of France?"}]
    text = smol.build_processor().apply_chat_template(question, add_generation_prompt=True)
    given = tokenizer(text, return_tensors="pt")
    said = model.generate(**given, do_sample=False, max_new_tokens=12)
    assert "Paris" in tokenizer.decode(said[0, given["input_ids"].shape[1] :])


@pytest.mark.parametrize("text", TEXTS)
def test_plain_text_has_smollm2_s_own_tokens(own, processor, text):
    ids = processor.tokenizer(text)["input_ids"]
    assert ids == own(text)["input_ids"] and processor.tokenizer.decode(ids) == text


def test_what_stands_for_pictures_takes_the_place_of_spare_tokens(own, processor):
    tokenizer = processor.tokenizer
    assert len(tokenizer) == len(own)
    assert [*smol.SPARE.values()] == [*TOKENS.values(), smol.AUDIO]
    for spare, name in smol.SPARE.items():
        (token,) = tokenizer(name)["input_ids"]
        assert token == own.convert_tokens_to_ids(spare) and tokenizer.decode(token) == name
    (end,) = tokenizer("<|im_end|>")["input_ids"]
    assert tokenizer.eos_token_id == end


CONVERSATIONS = [
    [("user", "Hello")],
    [("user", "Hello"), ("assistant", "Hi!"), ("user", "Who are you?")],
    [("system", "Answer in one word."), ("user", "2 + 2?")],
    [("system", "Be kind."), ("user", "Hello"), ("assistant", "Hi!")],
]


@pytest.mark.parametrize("turns", CONVERSATIONS)
@pytest.mark.parametrize("asked", [True, False])
def test_a_conversation_without_a_picture_is_smollm2_s_own(own, processor, turns, asked):
    messages = [{"role": role, "content": text} for role, text in turns]
    chosen = {"tokenize": False, "add_generation_prompt": asked}
    text = processor.apply_chat_template(messages, **chosen)
    assert text == own.apply_chat_template(messages, **chosen)
    assert text.startswith(smol.SYSTEM) == (turns[0][0] == "user")


def test_a_conversation_about_a_picture(processor):
    turns = [("What is it?", "dog"), ("How many?", "2")]
    messages = []
    for number, (question, answer) in enumerate(turns):
        image = [] if number else [{"type": "image"}]
        content = [*image, {"type": "text", "text": question}]
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    first = "<|im_start|>user\n<IMG_CONTEXT>\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"
    written = first + "dog<|im_end|>\n<|im_start|>user\nHow many?<|im_end|>\n"
    written += "<|im_start|>assistant\n2<|im_end|>\n"
    assert processor.apply_chat_template(messages) == written
    assert processor.apply_chat_template(messages[:1], add_generation_prompt=True) == first
    assert processor.prompt("What is it?") == first
    parts = processor.conversation(turns)
    assert "".join(parts) + "\n" == written.replace(processor.placeholder, processor.block)
    assert [part.endswith("<|im_end|>") for part in parts] == [False, True, False, True]
    assert processor.block.count("<IMG_CONTEXT>") == CELLS**2


def test_a_batch_is_what_the_processor_makes(processor):
    items = [sample(task, "train", 0) for task in ("Chart", "VQA")]
    batch = Collate(processor)(items)
    for row, item in enumerate(items):
        prompt = processor.prompt(item.turns[0].question)
        stock = processor(images=[Image.fromarray(item.image)], text=[prompt], return_tensors="pt")
        assert torch.equal(batch["pixel_values"][[row]], stock["pixel_values"])
        length = stock["input_ids"].shape[1]
        assert torch.equal(batch["input_ids"][row, :length], stock["input_ids"][0])
        assert (batch["labels"][row, :length] == -100).all()
        answer = batch["labels"][row][batch["labels"][row] != -100]
        said = processor.tokenizer.decode(answer).split("<|im_end|>")
        assert said == [turn.answer for turn in item.turns] + [""]


def test_the_factors_are_on_the_language_model_s_linear_layers_alone(chatty):
    names = [n for n, p in chatty.named_parameters() if p.requires_grad]
    wrapped = {name.partition(".lora_")[0] for name in names}
    assert len(wrapped) == 7 * LAYERS and len(names) == 2 * len(wrapped)
    assert all(".language_model.layers." in name for name in wrapped)
    assert {p.dtype for n, p in chatty.named_parameters() if n in names} == {torch.float32}


def test_the_seed_decides_tower_and_projector_and_nothing_of_the_words(small):
    first, again, other = (small(seed).state_dict() for seed in (0, 0, 1))
    same = {name for name in first if torch.equal(first[name], other[name])}
    assert all(torch.equal(first[name], again[name]) for name in first)
    words = {name for name in first if "language_model" in name or "lm_head" in name}
    assert words <= same and {n.split(".")[1] for n in first.keys() - same} == {
        "vision_tower",
        "multi_modal_projector",
    }


def test_sight_is_kept_in_float16(small, tmp_path):
    model, other = small(0), small(1)
    save_sight(model, tmp_path / "deep" / "sight.safetensors")
    load_sight(other, tmp_path / "deep" / "sight.safetensors")
    kept = sight(other)
    assert kept and all(torch.equal(kept[n], p.half().float()) for n, p in sight(model).items())


@pytest.fixture
def trained(chatty, tmp_path):
    """The folder of what training leaves of a base: base_adapter/ and sight.safetensors."""
    wake(chatty)
    save(chatty, None, tmp_path / "base_adapter", tmp_path / "base")
    save_sight(chatty.get_base_model(), tmp_path / "sight.safetensors")
    return tmp_path


def build_base(trained, name="base"):
    """The folder of a base that is built of these, and its SHA-256."""
    folder = trained / name
    return folder, smol.build_base(folder, trained / "base_adapter", trained / "sight.safetensors")


def test_the_base_has_the_same_bytes_on_any_number_of_threads(trained):
    digests, threads = set(), torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        try:
            folder, digest = build_base(trained, f"by {count}")
        finally:
            torch.set_num_threads(threads)
        digests |= {digest, hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()}
    assert len(digests) == 1


def test_the_base_is_smollm2_with_its_adapter_behind_what_was_trained_to_see(trained, small):
    folder, _ = build_base(trained)
    opened = AutoModelForImageTextToText.from_pretrained(folder)
    assert {p.dtype for p in opened.parameters()} == {torch.float16}
    seen = load_file(trained / "sight.safetensors")
    assert all(torch.equal(p, seen[name]) for name, p in sight(opened).items())
    before, after = small().state_dict(), opened.state_dict()
    factors = load_file(trained / "base_adapter" / "adapter_model.safetensors")
    for name in before.keys() - seen.keys():
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        expected = before[name].double()
        if f"{key}A.weight" in factors:
            a, b = (factors[f"{key}{side}.weight"].double() for side in "AB")
            expected = expected + 2 * b @ a
        assert torch.equal(after[name], expected.float().half()), name
    assert opened.generation_config.eos_token_id == smol.build_tokenizer().eos_token_id


def test_the_base_opens_with_its_processor_and_answers(trained, processor):
    folder, _ = build_base(trained)
    again = AutoProcessor.from_pretrained(folder)
    assert type(again) is type(processor) and again.chat_template == processor.chat_template
    assert again.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    text = again.prompt("What is it?")
    images = [Image.fromarray(sample("VQA", "train", 0).image)]
    given, stock = (p(images=images, text=[text], return_tensors="pt") for p in (again, processor))
    assert given.keys() == stock.keys() and all(torch.equal(given[k], stock[k]) for k in given)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    said = model.generate(**given, max_new_tokens=2, do_sample=False)
    assert said.shape[1] > given["input_ids"].shape[1]


def test_features_that_are_the_right_word_cost_nothing():
    """Two words, opposite each other around a mean that all words share."""
    embeddings = torch.tensor([[5.0, 1.0], [3.0, 1.0]])
    first = torch.tensor([[[1.0, 0.0]]])  # (one picture, one cell, two words)

    def cost(feature, targets=first):
        return tower.loss(torch.tensor([[feature]]), targets, embeddings).item()

    assert cost([5.0, 1.0]) == pytest.approx(0, abs=1e-6)
    assert cost([3.0, 1.0]) == pytest.approx(2 * tower.SHARPNESS)
    assert cost([4.0, 2.0]) == pytest.approx(np.log(2))
    assert cost([6.0, 1.0]) == pytest.approx(0.1 * np.log(2) ** 2, abs=1e-6)  # right, twice as long
    assert cost([5.0, 1.0], first / 2 + 0.25) == pytest.approx(tower.SHARPNESS / 2)


def test_a_cell_s_target_is_its_words_the_first_most_and_its_place(processor):
    words = tower.Words(processor.tokenizer, count=1)
    ids = words.ids.tolist()
    drawn = tower.picture("VQA", "train", 0, tower.LEVELS[0], seed=77)
    target = words.target(drawn)
    assert target.shape == (CELLS**2, len(ids)) and target.min() == 0
    assert target.sum(axis=1) == pytest.approx(1)
    known = [w for line in tower.words_of(drawn).values() for (w,) in line]
    one, two = [w.strip() for w in dict.fromkeys(known) if len(words.tokens(w)) == 1][:2]
    (line,) = words.target(SimpleNamespace(cells={(2, 3): [one, two]}))[[2 * CELLS + 3]]
    expected = dict.fromkeys((words.tokens(" C")[-1], words.tokens(" 3")[-1]), tower.PLACE / 2)
    for word, share in ((one, 2 / 3), (two, 1 / 3)):
        (token,) = words.tokens(word if len(word) == 1 else f" {word}")
        expected[token] = (1 - tower.PLACE) * share
    assert {ids[i]: line[i] for i in line.nonzero()[0]} == pytest.approx(expected)


def test_a_cell_of_a_thing_tells_the_tenths_where_its_edges_are(processor):
    words = tower.Words(processor.tokenizer, count=1, boxes=True)
    ids = words.ids.tolist()
    assert len({token for side in words.edges for token in side}) == 40
    box = (0, 56, 34, 112)  # of 112 pixels: 0, 50, 30 and 99 hundredths
    drawn = SimpleNamespace(cells={(2, 3): ["empty"], (4, 4): ["empty"]}, boxes={(2, 3): box})
    line, beside = words.target(drawn)[[2 * CELLS + 3, 4 * CELLS + 4]]
    found = {ids[i]: line[i] for i in line.nonzero()[0]}
    told = [words.tokens(text)[-1] for text in ("0", " five", "N", "t")]
    assert found == pytest.approx(
        {words.tokens(tower.EMPTY)[0]: 1 - tower.EDGES} | dict.fromkeys(told, tower.EDGES / 4)
    )
    places = {words.tokens(" E")[-1], words.tokens(" 4")[-1]}
    assert places <= {ids[i] for i in beside.nonzero()[0]}


def test_a_cell_spells_its_letters_and_digits_in_order():
    cells = {(0, 0): ["47", "pink"], (0, 1): ["o", "o", "K"], (0, 2): ["$", "8"], (0, 3): []}
    found = tower.words_of(SimpleNamespace(cells=cells))
    assert [found[0, column] for column in range(5)] == [
        [["4", " seven"], [" pink"]],
        [["o"], [" o"], [" K"]],
        [["$"], [" eight"]],
        [[tower.EMPTY]],
        [[tower.EMPTY]],
    ]


def test_the_tower_reads_pages_that_show_nothing_kept_for_the_test():
    page = tower.picture("OCR", "train", 1, "full", seed=0)
    assert page.turns == [] and len(page.cells) > 10
    assert tower.picture("OCR", "train", 2, "full", seed=0).turns
    read = {i: "".join(sum(writing.page(np.random.default_rng(i), "test").cells.values(), []))
            for i in range(20)}  # fmt: skip
    held = [w for w in lettering.words("words") if len(w) > 5 and reserved("word", w)]
    assert not [w for w in held for text in read.values() if w in text.lower()]


def test_conversations_come_padded_each_once_a_round_in_the_seed_s_order(processor):
    texts = [f"{'long ' * n}{n}" for n in (1, 3, 6, 300)]
    rows = [processor.tokenizer(text)["input_ids"] for text in texts]

    def drawn(seed):
        stream = chat.chat_batches(processor.tokenizer, texts, 2, seed)
        batches = [next(stream) for _ in range(2)]
        for ids, mask in batches:
            assert ids.shape == mask.shape and mask.any(dim=0).all()
            assert (ids[~mask] == processor.tokenizer.pad_token_id).all()
        return [ids[line][mask[line]].tolist() for ids, mask in batches for line in range(2)]

    assert sorted(drawn(0)) == sorted(row[: chat.WIDTH] for row in rows)
    assert drawn(0) == drawn(0) and any(drawn(0) != drawn(seed) for seed in range(1, 5))


def test_a_model_that_has_not_changed_chats_as_before(chatty, processor):
    ids, mask = next(chat.chat_batches(processor.tokenizer, TEXTS, len(TEXTS)))

    def loss():
        return chat.chat_loss(chatty, ids, mask, torch.Generator().manual_seed(0))

    assert loss().item() == 0
    wake(chatty)
    loss().backward()
    assert loss().item() > 0
    with_gradient = {n for n, p in chatty.named_parameters() if p.grad is not None}
    assert with_gradient and all(".lora_" in name for name in with_gradient)


def test_tower_base_and_experts_are_trained_one_after_the_other(small, tmp_path, monkeypatch):
    """A step or two of each by the command's own function, from nothing to an expert's adapter."""
    monkeypatch.setattr(build, "SMOL", {
        "tower": {"learning_rate": 1e-3, "steps": 2, "batch": 2, "seed": 0},
        "stage": {"learning_rate": 1e-2, "steps": 2, "batch": 2, "seed": 0, "rank": 2},
        "tower2": {"learning_rate": 1e-3, "steps": 2, "batch": 2, "seed": 0, "boxes": True},
        "base": {"learning_rate": 1e-12, "steps": 2, "batch": 2, "seed": 1, "rank": 2,
                 "boxes": True, "tasks": {"Grounding": 1.0}, "kept": 0.5},
    })  # fmt: skip
    short = {"learning_rate": 1e-2, "steps": 2, "rank": 2, "batch": 2}
    monkeypatch.setitem(build.REGIMES, "smol", {"lora": short})
    monkeypatch.setattr(build.smol, "build_model", smol.build_model)
    monkeypatch.setattr(tower.Words, "__init__", partialmethod(tower.Words.__init__, count=20))
    for name in ("tower", "stage", "tower2", "base", "lora/OCR"):
        build.build(tmp_path, "smol", only=name)
        log = json.loads((tmp_path / f"{name}.json").read_text())
        assert log["samples"] == 4 and np.isfinite(log["loss"]).all()
    places = ("tower", "stage", "tower2", "")
    towers = [load_file(tmp_path / place / "sight.safetensors") for place in places]
    for earlier, later in ((0, 1), (1, 2)):  # it learns on
        assert any(not torch.equal(t, towers[later][n]) for n, t in towers[earlier].items())
    assert all(torch.equal(t, towers[2][n]) for n, t in towers[3].items())  # at a rate of nothing
    learnt, kept = (
        load_file(tmp_path / place / "adapter_model.safetensors")
        for place in ("stage", "base_adapter")
    )
    assert learnt.keys() == kept.keys() and any("lora_B" in n and t.any() for n, t in kept.items())
    for name, tensor in learnt.items():  # and half of what it learnt is kept
        assert torch.equal(tensor * (0.5 if "lora_B" in name else 1.0), kept[name]), name
    built = (tmp_path / "base" / "model.safetensors").read_bytes()
    log = json.loads((tmp_path / "base.json").read_text())
    assert log["sha256"] == hashlib.sha256(built).hexdigest() and log["build"] == smol.BUILD
    base = open_checkpoint(tmp_path / "base")
    expert = open_expert(tmp_path / "lora" / "OCR", base)
    assert len(expert.changes) == 7 * LAYERS
    assert all(expert.task_vector(name).any() for name in expert.changes)
    assert smol.base_folder(tmp_path) == tmp_path / "base"
