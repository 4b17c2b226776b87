"""The Omni benchmark's specialists and their training data, at the size of a test."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer

from optmerge_core.benchmark.experiments import omni_seeds
from optmerge_core.benchmark.experiments.omni_evaluation import (
    OmniEvaluator,
    accuracies,
    answer_described,
    draw_questions,
)
from optmerge_core.benchmark.models.omni import (
    FEATURES,
    MODALITIES,
    PLACEHOLDERS,
    answerable,
    build_specialist,
    build_tokenizer,
    changes,
    describe,
    feature_extractor,
    image_processor,
    in_words,
    modality_inputs,
    prompt,
)
from optmerge_core.benchmark.tasks.clips import FRAMES, NEEDS, clip, questions, told
from optmerge_core.benchmark.training import omni as omni_training
from optmerge_core.benchmark.training.clips import (
    CLASSES,
    TURNS,
    Clips,
    Described,
    Perceived,
    conversation,
    moment_labels,
    patch_labels,
    prompts,
    text_batch,
)
from optmerge_core.checkpoints.open import open_checkpoint
from optmerge_core.merging.families import mergeable
from optmerge_core.omni import OmniForConditionalGeneration, compose
from optmerge_core.omni.online import online_weights, route
from optmerge_core.omni.specialists import LanguageModel, open_specialist
from optmerge_core.study.recipe import Recipe


@pytest.fixture(scope="module")
def clips():
    return [clip(np.random.default_rng([9, i])) for i in range(8)]


@pytest.fixture(scope="module")
def processors():
    return image_processor(), feature_extractor()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Everything that `build` makes, after two steps of each training."""
    folder = tmp_path_factory.mktemp("omni_benchmark")
    with pytest.MonkeyPatch.context() as patch:
        rounds = [[(1, omni_training.SEEN), (1, omni_training.ALL)], [(1, omni_training.ALL)]]
        for name in ("LANGUAGE", "TOWERS", "SPECIALIST"):
            few = getattr(omni_training, name) | {"batch": 8, "workers": 0}
            few |= {"LANGUAGE": {"rounds": rounds}, "TOWERS": {"steps": 2}}.get(name, {})
            patch.setattr(omni_training, name, few)
        patch.setattr(omni_training, "STEPS", dict.fromkeys(MODALITIES, 2))
        omni_training.build(folder, seeds=(1,))
    return folder


def test_words_are_known_and_decoding_is_lossless(clips):
    tokenizer = build_tokenizer()
    for item in clips:
        for question, answer, _ in questions(item):
            text = prompt(question, words=in_words(item, MODALITIES)) + f" {answer}"
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == text


@torch.no_grad()
@pytest.mark.parametrize("modality", MODALITIES)
def test_there_is_a_placeholder_for_every_feature(clips, processors, modality):
    model, tokenizer = build_specialist(modality)
    inputs = modality_inputs(clips, [modality], *processors)[modality]
    ids = tokenizer([prompt("what moves ?", [modality])] * len(clips), return_tensors="pt")
    number = tokenizer.convert_tokens_to_ids(PLACEHOLDERS[modality])
    assert ((ids["input_ids"] == number).sum(1) == FEATURES[modality]).all()
    mask = torch.ones_like(ids["input_ids"])
    logits = model(input_ids=ids["input_ids"], attention_mask=mask, **inputs).logits
    assert logits.shape[:2] == ids["input_ids"].shape
    assert not torch.allclose(logits[0, -1], logits[1, -1])  # other clips, other answers


def first_turn(ids, labels):
    """The tokens of a conversation up to its first answer's end."""
    end = (labels >= 0).long().argmax() + 1
    while end < len(labels) and labels[end] >= 0:
        end += 1
    return ids[:end], labels[:end]


def test_a_described_clip_holds_what_its_question_needs():
    """Of the described modalities alone the answer follows; nothing else is asked."""
    tokenizer, data = build_tokenizer(), Clips(40, seed=3)
    batch = Described(tokenizer)([data[i] for i in range(40)])
    for i, row in enumerate(zip(batch["input_ids"], batch["labels"], strict=True)):
        ids, labels = first_turn(*row)
        item = data[i][0]
        text = tokenizer.decode(ids[labels == -100], skip_special_tokens=True)
        answer = tokenizer.decode(labels[labels >= 0], skip_special_tokens=True).strip()
        given = [m for m in MODALITIES if f"{told(item, m)} ." in text]
        if "describe the clip" in text:
            assert answer == describe(item, given)
        else:
            kinds = {k for q, a, k in questions(item) if q in text and a == answer}
            assert any(answerable(kind, given) for kind in kinds)


@pytest.mark.parametrize("modality", MODALITIES)
def test_a_specialist_is_given_its_modality_alone(processors, modality):
    """Every question needs it; what else a question needs is told in words."""
    data, tokenizer = Clips(24, seed=4), build_tokenizer(modality)
    batch = Perceived(modality, tokenizer, *processors)([data[i] for i in range(24)])
    assert set(batch) == {"input_ids", "labels", "attention_mask"} | set(
        modality_inputs([data[0][0]], [modality], *processors)[modality]
    )
    number, needed = tokenizer.convert_tokens_to_ids(PLACEHOLDERS[modality]), set()
    for i, row in enumerate(zip(batch["input_ids"], batch["labels"], strict=True)):
        assert (row[0] == number).sum() == FEATURES[modality]
        ids, labels = first_turn(*row)
        item = data[i][0]
        text = tokenizer.decode(ids[labels == -100], skip_special_tokens=True)
        answer = tokenizer.decode(labels[labels >= 0], skip_special_tokens=True).strip()
        given = [m for m in MODALITIES if m == modality or f" {told(item, m)} ." in text]
        assert f" {told(item, modality)} ." not in text
        kinds = {k for q, a, k in questions(item) if q in text and a == answer}
        assert answer == describe(item, given) or any(
            modality in NEEDS[kind] and answerable(kind, given) for kind in kinds
        )
        needed |= {len(NEEDS[kind]) for kind in kinds}
    assert {1, 2} <= needed
    alone = Perceived(modality, tokenizer, *processors, told=0)([data[i] for i in range(8)])
    assert alone["input_ids"].shape[1] < batch["input_ids"].shape[1]


def test_a_prompt_by_hand(clips):
    item = clips[0]
    words = in_words(item, ["vision", "video"])
    text = prompt("what moves ?", ["audio"], words)
    heard = FEATURES["audio"] * "<|AUDIO|>"
    vision, video = told(item, "vision"), told(item, "video")
    assert text == f"USER: {vision} .{heard} {video} . what moves ? ASSISTANT:"
    ids = build_tokenizer("audio")(text)["input_ids"]
    assert build_tokenizer("audio").unk_token_id not in ids


def test_text_batch_by_hand():
    tokenizer = build_tokenizer()
    asked = ("USER: what moves ? ASSISTANT:", "circle")
    batch = text_batch(tokenizer, [[asked], [("USER: ASSISTANT:", "2")]])
    assert batch["labels"][0, -2:].tolist() == [
        *tokenizer(" circle")["input_ids"],
        tokenizer.eos_token_id,
    ]
    assert (batch["labels"] >= 0).sum(1).tolist() == [2, 2]
    assert batch["input_ids"][1, -1] == tokenizer.pad_token_id
    twice = text_batch(tokenizer, [[asked, asked]])
    for name, tensor in twice.items():
        assert torch.equal(tensor[0], batch[name][0].repeat(2))


def test_a_conversation_asks_each_kind_once(clips):
    lengths = set()
    for i, item in enumerate(clips * 8):
        turns = conversation(item, np.random.default_rng(i), ["vision", "audio"])
        lengths.add(len(turns))
        known = {(q, a): kind for q, a, kind in questions(item)}
        kinds = [known[turn] for turn in turns if turn in known]
        assert len(set(kinds)) == len(kinds) >= len(turns) - 1
        assert all(answerable(kind, ["vision", "audio"]) for kind in kinds)
        texts = prompts(turns, ["audio"])
        assert [PLACEHOLDERS["audio"] in text for text, _ in texts] == [
            True, *[False] * (len(turns) - 1)
        ]  # fmt: skip
        harder = conversation(item, np.random.default_rng(i), MODALITIES, least=2)
        asked = [known[turn] for turn in harder if turn in known]
        assert len(asked) >= len(harder) - 1 and all(len(NEEDS[kind]) > 1 for kind in asked)
    assert {1, TURNS} <= lengths <= set(range(1, TURNS + 2))


def test_labels_say_what_is_in_each_patch_and_moment(clips):
    for item in clips:
        seen = patch_labels(item, "vision")
        there = seen["color"] > 0
        assert 1 <= there.sum() <= len(item.things)
        assert all(((labels > 0) == there).all() for labels in seen.values())
        found = {
            tuple(CLASSES[head][seen[head][patch] - 1] for head in seen)
            for patch in np.flatnonzero(there)
        }
        assert found <= {(t.body.color, t.body.shape, t.at(2).place) for t in item.things}
        moving = patch_labels(item, "video")
        (patch,) = np.flatnonzero(moving["way"])
        x, y = item.mover.body.center
        assert patch == 4 * int(y // 14) + int(x // 14)
        assert CLASSES["way"][moving["way"][patch] - 1] == item.mover.way
        assert CLASSES["shape"][moving["shape"][patch] - 1] == item.mover.body.shape
        heard = moment_labels(item)
        assert ((heard["shape"] > 0) == (heard["pitch"] > 0)).all()
        slots = heard["shape"].reshape(-1)[[4, 12, 20]]
        names = [CLASSES["shape"][i - 1] for i in slots if i]
        assert names == [note.body.shape for note in item.notes]


def test_video_shows_what_changes_alone(clips):
    """Grey where nothing moves; the mover's way is where it brightens or darkens next."""
    for item in clips:
        pictures = changes(item)
        assert pictures.shape == (FRAMES - 1, 56, 56, 3) and pictures.dtype == np.uint8
        moved = (pictures != 128).any((0, 3))
        left, top, right, bottom = item.mover.body.box
        rows, columns = np.nonzero(moved)
        assert abs((rows.min() + rows.max()) / 2 - (top + bottom) / 2) <= 2
        assert abs((columns.min() + columns.max()) / 2 - (left + right) / 2) <= 2


def test_what_is_built_is_shipped_as_the_hub_has_it(built):
    for modality, kind in {"vision": "LlavaProcessor", "audio": "Qwen2AudioProcessor"}.items():
        processor = AutoProcessor.from_pretrained(built / "specialists" / modality)
        assert type(processor).__name__ == kind
    log = json.loads((built / "seed1" / "audio.json").read_text())
    assert log["seed"] == 2 and len(log["loss"]) == 2
    adapter = json.loads((built / "seed1/video/adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == "../../specialists/video"
    assert adapter["modules_to_save"] == ["multi_modal_projector"]
    text = json.loads((built / "seed1/decoupled/video/text/adapter_config.json").read_text())
    assert text["base_model_name_or_path"] == "../../../../specialists/video"
    assert text["modules_to_save"] is None


def test_the_stock_processors_give_the_same_inputs(built, clips, processors):
    item = clips[0]
    for modality, given in {
        "vision": {"images": [item.picture]},
        "audio": {"audio": [item.sound], "sampling_rate": 16000},
    }.items():
        processor = AutoProcessor.from_pretrained(built / "specialists" / modality)
        text = f"USER: {PLACEHOLDERS[modality]} what moves ? ASSISTANT:"
        stock = processor(text=text, return_tensors="pt", **given)
        ours = modality_inputs([item], [modality], *processors)[modality]
        for name, tensor in ours.items():
            torch.testing.assert_close(stock[name], tensor)
        number = processor.tokenizer.convert_tokens_to_ids(PLACEHOLDERS[modality])
        assert (stock["input_ids"] == number).sum() == FEATURES[modality]


@torch.no_grad()
def test_the_adapters_compose(built, clips, processors, tmp_path):
    specialists = {m: built / "seed1" / m for m in MODALITIES}
    folder = compose(built / "language_model", specialists, tmp_path / "omni")
    model = OmniForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = modality_inputs(clips, MODALITIES, *processors)
    ids = tokenizer([prompt("what moves ?", MODALITIES)] * len(clips), return_tensors="pt")
    settings = {"min_new_tokens": 2, "max_new_tokens": 2, "do_sample": False}
    told_ids = model.generate(input_ids=ids["input_ids"], modality_inputs=inputs, **settings)
    assert told_ids.shape == (len(clips), ids["input_ids"].shape[1] + 2)


def test_questions_are_drawn_evenly_and_again_the_same():
    items = draw_questions("test", 3)
    assert [kind for *_, kind in items] == [kind for kind in NEEDS for _ in range(3)]
    for item, question, answer, kind in items:
        assert (question, answer, kind) in questions(item)
    again = draw_questions("test", 3)
    assert [row[1:] for row in again] == [row[1:] for row in items]
    other = draw_questions("validation", 3)
    assert any(a[0].sound[0] != b[0].sound[0] for a, b in zip(items, other, strict=True))


def test_the_evaluator_answers_as_the_model_does(built, processors, tmp_path):
    specialists = {m: built / "seed1" / m for m in MODALITIES}
    folder = compose(built / "language_model", specialists, tmp_path / "omni")
    items = draw_questions("test", 1)
    evaluator = OmniEvaluator(folder, items, ["audio", "video"])
    table = evaluator.answer()
    assert list(table["kind"]) == list(NEEDS)
    assert (table["correct"] == (table["prediction"] == table["answer"])).all()
    model = OmniForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt(items[4][1], ["audio", "video"]), return_tensors="pt")["input_ids"]
    inputs = modality_inputs([items[4][0]], ["audio", "video"], *processors)
    tokens = model.generate(
        input_ids=ids, modality_inputs=inputs, max_new_tokens=4, do_sample=False
    )
    said = tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True).strip()
    assert table["prediction"][4] == said


def test_weights_replaced_and_routed_give_the_same_answers(built, tmp_path):
    """All kinds of token through one merge, and the merge itself; then the folder's own again."""
    folder = tmp_path / "omni"
    specialists = {m: built / "seed1" / m for m in MODALITIES}
    base = LanguageModel(open_checkpoint(built / "language_model"))
    compose(built / "language_model", specialists, folder, method="task_arithmetic")
    evaluator = OmniEvaluator(folder, draw_questions("test", 2))
    before = evaluator.answer()
    names = mergeable({n: base.shape(n) for n in base}, "llama")
    noise = {n: base[n].float() + 0.1 * torch.randn(base.shape(n)) for n in names}
    changed = evaluator.answer(noise)
    assert not changed["prediction"].equals(before["prediction"])
    assert evaluator.answer().equals(before)
    route(evaluator.model, {kind: noise for kind in ("text", *MODALITIES)})
    assert evaluator.answer().equals(changed)
    opened = {m: open_specialist(path).language_model for m, path in specialists.items()}
    own = {m: {n: lm[n].float() for n in names} for m, lm in opened.items()}
    route(evaluator.model, online_weights(own))
    assert not evaluator.answer().equals(changed)


def test_a_described_clip_is_answered_as_the_language_model_does(built):
    items = draw_questions("test", 2)
    table = answer_described(built / "language_model", items, batch_size=3)
    tokenizer = AutoTokenizer.from_pretrained(built / "language_model")
    model = AutoModelForCausalLM.from_pretrained(built / "language_model", dtype=torch.float32)
    item, question, _, kind = items[-1]
    text = prompt(question, words=in_words(item, NEEDS[kind]))
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    tokens = model.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
    said = tokenizer.decode(tokens, skip_special_tokens=True).strip()
    assert table["prediction"].iloc[-1] == said
    assert (table["correct"] == (table["prediction"] == table["answer"])).all()


def test_drawn_questions_take_all_that_they_need():
    items = draw_questions("validation", 10)
    kinds = [kind for *_, kind in items]
    assert {kind: kinds.count(kind) for kind in NEEDS} == dict.fromkeys(NEEDS, 10)
    for item, question, answer, kind in items:
        assert (question, answer, kind) in questions(item)
        if kind == "pitch of the mover":
            assert {note.pitch for note in item.notes} == {"low", "high"}
        if kind == "color of the still sound":
            assert len(item.notes) > 1 and any(note.way for note in item.notes)


def test_accuracies_by_hand():
    rows = [(kind, kind in ("color", "shape", "moving sound")) for kind in NEEDS]
    answers = pd.DataFrame(rows, columns=["kind", "correct"])
    found = accuracies(answers)
    assert found["color"] == found["moving sound"] == 100 and found["way"] == 0
    alone = sum(len(needs) == 1 for needs in NEEDS.values())
    assert found["one modality"] == pytest.approx(200 / alone)
    assert found["several"] == pytest.approx(100 / (len(NEEDS) - alone))
    assert found["Avg"] == pytest.approx(300 / len(NEEDS))


def test_the_study_has_a_row_for_every_model(built, monkeypatch):
    monkeypatch.setattr(omni_seeds, "MERGES", ["weight_average", "tsv"])
    language_model = str(built / "language_model")
    specialists = [{"name": m, "model": "set below"} for m in MODALITIES]
    study = Recipe(
        base_model=language_model,
        models=specialists,
        merges="modalities",
        scaling_coefficients=[1.0],
    )
    specialists = {m: str(built / "seed1" / m) for m in MODALITIES}
    decoupled = {m: str(built / "seed1" / "decoupled" / m) for m in MODALITIES}
    items = draw_questions("test", 1)
    table = omni_seeds.evaluate(study, specialists, decoupled, items, items)
    models = {*MODALITIES, "base_model", "weight_average", "tsv", "naive_mc", "damc"}
    assert set(table.index) == models
    assert list(table.columns) == [*NEEDS, "one modality", "several", "Avg"]
    without = omni_seeds.evaluate(study, specialists, {}, items, items)
    assert set(without.index) == models - {"damc"}
    pd.testing.assert_frame_equal(without, table.loc[without.index])


def test_the_shipped_language_model_knows_what_it_is_told():
    questions = draw_questions("validation", 10)
    table = answer_described("data/benchmark/omni/language_model", questions)
    assert accuracies(table)["Avg"] > 95


def test_the_shipped_scores_have_three_seeds():
    table = pd.read_csv("data/benchmark/omni/seeds.csv", index_col=["seed", "model"])
    for seed in omni_training.SEEDS:
        models = {*MODALITIES, "base_model", *omni_seeds.MERGES, "naive_mc", "damc"}
        assert models == set(table.loc[seed].index)
    average = table[list(NEEDS)].mean(axis=1)
    pd.testing.assert_series_equal(average, table["Avg"], check_names=False, atol=1e-3)
