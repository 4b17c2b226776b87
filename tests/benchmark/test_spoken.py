"""The study of a spoken question about a picture, with a small Llama in SmolLM2's place."""

import hashlib
import json
import re
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from optmerge_core.benchmark.experiments import spoken_evaluation as evaluation
from optmerge_core.benchmark.experiments import spoken_seeds as seeds
from optmerge_core.benchmark.models import ear, smol
from optmerge_core.benchmark.models import spoken as models
from optmerge_core.benchmark.tasks import speech, spoken_questions
from optmerge_core.benchmark.tasks import spoken as tasks
from optmerge_core.benchmark.tasks.english import telling
from optmerge_core.benchmark.tasks.english.stage import THIRDS
from optmerge_core.benchmark.tasks.english.telling import Asked, Shown
from optmerge_core.benchmark.tasks.samples import SPLITS, image_hash
from optmerge_core.benchmark.training import hearing, listening, spoken, spoken_build
from optmerge_core.benchmark.training.smol import save_sight
from optmerge_core.omni import OmniForConditionalGeneration, compose
from optmerge_core.omni.specialists import open_specialist as open_omni_specialist
from optmerge_core.study.open import open_study
from optmerge_core.study.recipe import Recipe

SKILLS = (*tasks.PICTURES, *tasks.SKILLS)


@pytest.fixture(scope="module")
def patched():
    """A Llama of two layers that knows SmolLM2's words, a small tower, voices that are noise."""
    config = LlamaConfig(
        vocab_size=len(smol.build_tokenizer()), hidden_size=24, intermediate_size=32,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(7)
    llama = LlamaForCausalLM(config)

    def say(rng, text, voice):
        size = ear.RATE * (1 + 4 * (len(text) > 60))
        return (0.1 * rng.standard_normal(size)).astype(np.float32)

    with pytest.MonkeyPatch.context() as patch:
        for module in (smol, ear, spoken):
            patch.setattr(module, "language_model", lambda: llama)
        patch.setattr(smol, "build_model", partial(smol.build_model, width=16, layers=1))
        for module in (hearing, listening, spoken_questions):
            patch.setattr(module, "say", say)
        yield patch


@pytest.fixture(scope="module")
def built(patched, tmp_path_factory):
    """Everything that `build` makes, after a step or two of each training."""
    folder = tmp_path_factory.mktemp("spoken")
    short = {"steps": 2, "batch": 3, "rank": 2}
    patched.setattr(spoken_build, "LANGUAGE_MODEL", spoken_build.LANGUAGE_MODEL | short)
    patched.setattr(spoken_build, "SPECIALIST", {"learning_rate": 1e-2, "batch": 3, "rank": 2})
    patched.setattr(spoken_build, "STEPS", {"vision": 2, "speech": 2})
    patched.setattr(spoken_build, "HEARD", {"train": 30, "validation": 6})
    patched.setattr(spoken_build, "ASKED", 1)
    patched.setattr(listening, "SHARD", 20)
    patched.setattr(hearing, "EAR", {"learning_rate": 1e-3, "steps": 2, "batch": 3, "seed": 0,
                                     "clips": 4})  # fmt: skip
    patched.setattr(hearing, "ASKED", 2)
    sight = folder / models.SIGHT
    save_sight(smol.build_model(smol.build_tokenizer()), sight)
    spoken_build.build(folder, seeds=(1,), sight=sight)
    return folder


# ---------------------------------------------------------------- pictures and their descriptions


def regions_told(told):
    """What a description says: [(thing in words, row, column)], whichever way it is said."""
    where = {word: (r, c) for r, row in enumerate(THIRDS) for c, word in enumerate(row)}
    names = "|".join(sorted(where, key=len, reverse=True))
    said = told.partition(": ")[2].removesuffix(".")
    if re.match(rf"(?:{names}): ", said):
        found = [part.split(": ")[::-1] for part in said.split("; ")]
    elif re.match(rf"(?:at|in) the (?:{names}) ", said):
        pairs = [re.fullmatch(rf"(?:at|in) the ({names}) an? (.+)", p) for p in said.split(", ")]
        found = [(pair[2], pair[1]) for pair in pairs]
    else:
        pairs = [re.fullmatch(rf"(.+) (?:at|in) the ({names})", p) for p in said.split(", ")]
        found = [(pair[1], pair[2]) for pair in pairs]
    return [(what, *where[place]) for what, place in found]


RELATION = re.compile(r"the (?P<x>[a-z ]+?) (?:is )?(?P<side>left of|right of|above|below) the "
                      r"(?P<y>[a-z ]+?)(?:\?|: yes)", re.I)  # fmt: skip


def test_what_is_asked_of_a_scene_follows_from_its_description():
    """Places, relations, colours and what is there, read by rule from the words alone."""
    checked = dict.fromkeys(("relation", "place", "named", "color", "count"), 0)
    for index in range(60):
        drawn = telling.shown("scene", "train", index)
        things = regions_told(drawn.told)
        assert len(things) <= telling.THINGS[1]
        assert len({(row, column) for _, row, column in things}) == len(things)

        def told(x, things=things):
            return [t for t in things if f" {t[0].split(' on a ')[0]}".endswith(f" {x}")]

        for asked in drawn.asked:
            checked[asked.kind] = checked.get(asked.kind, 0) + 1
            if asked.kind == "named":
                there = bool(told(asked.heard.removeprefix("an ").removeprefix("a ")))
                assert asked.answer == ("yes" if there else "no") and asked.written
            elif asked.kind == "color":
                assert f"{asked.answer} " in drawn.told
            elif asked.kind == "count" and " things " in asked.heard + " ":
                assert int(asked.answer) <= len(things)
            elif asked.kind == "place":
                found = told(asked.heard.rpartition("the ")[2].rstrip("?"))
                assert asked.answer in {THIRDS[row][column] for _, row, column in found}
            elif (said := RELATION.search(asked.heard)) and asked.kind == "relation":
                one, other = (told(said[x].split("that the ")[-1]) for x in "xy")
                if len(one) == len(other) == 1:
                    (_, y1, x1), (_, y2, x2) = one[0], other[0]
                    truth = {"left of": x1 < x2, "right of": x1 > x2, "above": y1 < y2,
                             "below": y1 > y2}[said["side"].lower()]  # fmt: skip
                    assert asked.answer == ("yes" if truth else "no"), (drawn.told, asked)
    assert min(list(checked.values())[:5]) > 3, checked


def test_what_is_asked_of_a_text_is_written_in_its_description():
    for index in range(20):
        drawn = telling.shown("text", "train", index)
        for asked in drawn.asked:
            told = re.sub(r"; second line:|first line: ", "", drawn.told)
            assert f" {asked.answer}" in told, (drawn.told, asked)


@pytest.mark.parametrize("skill", SKILLS)
def test_an_exchange_is_the_same_again_and_in_its_split(skill):
    for split in SPLITS:
        some = [tasks.exchange(skill, split, i) for i in range(12)]
        again = tasks.exchange(skill, split, 3)
        assert again.asked == some[3].asked
        assert len({x.asked for x in some}) > 8 or skill == "text"
        assert all(not x.asked.held_out for x in some) or split == "test"
        for x in some:
            assert x.asked.answer and (x.shown is None) == (skill not in tasks.PICTURES)
            if x.shown:
                assert int(image_hash(x.shown.image), 16) % 10 in SPLITS[split]


def test_sums_and_orders_are_right():
    for i in range(60):
        asked = tasks.known(np.random.default_rng(i), "train")
        if asked.kind == "sum":
            words = asked.heard.removesuffix("?").split()
            total = sum(1 + tasks.NUMBERS.index(w) for w in words if w in tasks.NUMBERS)
            assert asked.answer == str(total)
        if asked.heard == "Which day comes after Sunday?":
            assert asked.answer == "Monday"


def test_some_things_are_never_said():
    assert tasks.unheard("Is there a DRUM?") and tasks.unheard("two drums")
    assert not tasks.unheard("What color is the dog?")


def test_a_prompt_by_hand():
    shown = Shown(None, "Picture: a dog.", [])
    asked = Asked("a dog", "yes", "named", False, "Do you see it?")
    exchange = tasks.Exchange("scene", shown, asked)
    start, end = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
    found = models.prompt(exchange)
    assert found == f"{start}Picture: a dog.\na dog\nDo you see it?{end}"
    seen = models.prompt(exchange, "seen", "heard", 2)
    image = "<img>" + 49 * "<IMG_CONTEXT>" + "</img>"
    assert seen == f"{start}{image}\n[AUDIO][AUDIO]\nDo you see it?{end}"
    assert models.prompt(exchange, None, None) == f"{start}Do you see it?{end}"
    question = tasks.Exchange("scene", shown, Asked("What is it?", "dog", "name"))
    written = models.prompt(question, "seen", "written")
    assert written == smol.build_processor().prompt("What is it?", image)
    numbers = models.places()
    ids = smol.build_tokenizer()(seen)["input_ids"]
    assert (ids.count(numbers["pixel_values"]), ids.count(numbers["frames"])) == (49, 2)


# ---------------------------------------------------------------- listening and training


def test_what_is_heard_is_kept_and_not_heard_again(built, monkeypatch):
    folder = built / "clips" / "train"
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) == 2 and not list(folder.glob("*.partial"))
    clips = listening.Clips(folder)
    assert 20 < len(clips) <= 30
    tower = ear.build_ear(smol.build_tokenizer()).model.audio_tower
    number = next(n for n in range(9) if listening.spoken_exchange("train", n, 0))
    drawn, heard = listening.spoken_exchange("train", number, 0)
    clip = next(c for c in clips.clips[drawn.skill] if c.exchange.asked == drawn.asked)
    with torch.inference_mode():
        expected = tower(heard).last_hidden_state.reshape(-1, 4 * 384)
    torch.testing.assert_close(clip.frames.float(), expected, atol=2e-3, rtol=2e-3)
    assert len(clip.frames) == ear.TOKENS * len(heard)
    assert all(not tasks.unheard(c.exchange.asked.heard) for c in sum(clips.clips.values(), []))
    monkeypatch.setattr(listening, "spoken_exchange", None)  # would fail if it were asked
    listening.listen(folder, tower, "train", 30, seed=0)
    one = clips.draw("scene", "train", 5, "full", 1)
    assert one is clips.draw("scene", "train", 5, "full", 1) and one.exchange.skill == "scene"


@torch.no_grad()
@pytest.mark.parametrize("modality", models.MODALITIES)
def test_features_stand_where_the_stock_class_puts_them(built, modality):
    model = models.open_specialist(built / "specialists" / modality).eval()
    if modality == "speech":
        for parameter in model.model.multi_modal_projector.parameters():
            parameter.normal_(std=0.05)
        heard = torch.randn(2, 80, 2 * ear.FRAMES)
        frames = model.model.audio_tower(heard).last_hidden_state.reshape(-1, 4 * 384)
        items = [listening.Clip(tasks.exchange("knowledge", "test", 0), frames)]
        asks, own = spoken.Asks(smol.build_processor(), voice="heard"), {"input_features": heard}
    else:
        items = [tasks.exchange("scene", "test", 0)]
        asks, own = spoken.Asks(smol.build_processor(), picture="seen"), {}
    batch = asks(items)
    own = own or {"pixel_values": batch["pixel_values"]}
    expected = model(input_ids=batch["input_ids"], **own).logits
    hidden = model.get_decoder()(inputs_embeds=spoken.embedded(model, batch)).last_hidden_state
    torch.testing.assert_close(model.lm_head(hidden), expected, atol=1e-4, rtol=1e-3)
    text = smol.build_tokenizer()("What is the dog?", return_tensors="pt")["input_ids"]
    base = AutoModelForCausalLM.from_pretrained(built / "language_model", dtype=torch.float32)
    torch.testing.assert_close(model(input_ids=text).logits, base(input_ids=text).logits)


def test_a_batch_answers_in_its_labels():
    asks = spoken.Asks(smol.build_processor())
    items = [tasks.exchange(skill, "train", 1) for skill in SKILLS]
    batch, tokenizer = asks(items), asks.processor.tokenizer
    for item, ids, labels in zip(items, batch["input_ids"], batch["labels"], strict=True):
        said = tokenizer.decode(labels[labels != -100])
        assert said == item.asked.answer + "<|im_end|>"
        assert tokenizer.decode(ids).startswith(models.prompt(item) + said)
    order = [asks.length(x) for x in items]
    assert all(length > 30 for length in order) and len({asks.chance(x) for x in items}) > 3


def test_language_model_and_specialists_are_built_again_to_the_byte(built):
    log = json.loads((built / "language_model.json").read_text())
    assert log["build"] == models.BUILD and log["samples"] == 6
    assert set(log["validation"]) == set(SKILLS)
    weights = built / "language_model" / "model.safetensors"
    assert log["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    for path in (weights, built / "specialists" / "speech" / "model.safetensors"):
        before = path.read_bytes()
        path.write_bytes(b"damaged")
        found = models.folders(built, built / models.SIGHT)
        assert path.read_bytes() == before
    assert list(found) == ["language_model", "specialists/vision", "specialists/speech"]
    model = AutoModelForCausalLM.from_pretrained(built / "language_model")
    factors = load_file(built / models.ADAPTER / "adapter_model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    a, b = (factors[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "AB")
    start = smol.language_model().state_dict()[f"{name}.weight"].double()
    assert torch.equal(model.state_dict()[f"{name}.weight"], (start + 2 * b @ a).float().half())
    tokenizer = AutoTokenizer.from_pretrained(built / "language_model")
    assert tokenizer.chat_template == smol.CHAT_TEMPLATE
    with pytest.raises(ValueError, match="is not there: the study smol's base .*--sight"):
        models.build_vision(built / "none", built / "language_model", built / "none.safetensors")


def test_a_specialist_is_an_adapter_and_its_projector(built):
    for modality in models.MODALITIES:
        own = load_file(built / "seed1" / modality / "adapter_model.safetensors")
        assert {"lora" in n or "multi_modal_projector" in n for n in own} == {True}
        assert sum("lora_B" in n for n in own) == 14 and any("projector" in n for n in own)
        assert all(tensor.dtype == torch.float16 for tensor in own.values())
        log = json.loads((built / "seed1" / f"{modality}.json").read_text())
        sense = {"vision": "seen", "speech": "heard"}[modality]
        assert set(log["validation"]) == {sense, "in words"}
        for place in ("", "text"):
            path = built / "seed1" / "decoupled" / modality / place / "adapter_model.safetensors"
            assert not any("projector" in n for n in load_file(path))
    control = load_file(built / "controls" / "vision" / "adapter_model.safetensors")
    assert not any(t.any() for n, t in control.items() if "lora_B" in n)
    sight, trained = (
        load_file(built / models.SIGHT),
        spoken.own_projector(built / "controls/vision"),
    )
    assert any(
        not torch.equal(sight[f"model.multi_modal_projector.{n}"].float(), t)
        for n, t in trained.items()
    )
    with pytest.raises(
        ValueError, match="no 'seed1/touch' to train; there are language_model, ear"
    ):
        spoken_build.build(built, only="seed1/touch")


@pytest.mark.parametrize(
    ("skill", "said", "answer", "right"),
    [
        ("scene", "Red.", "red", True),
        ("scene", "a dog", "dog", True),
        ("text", "Bus Theater", "BUS THEATER", True),
        ("write", "What is four plus six", "What is four plus six?", True),
        ("spell", "c-a-t", "c a t", True),
        ("spell", "c a r t", "c a t", False),
        ("knowledge", "no", "yes", False),
    ],
)
def test_what_counts_as_right(skill, said, answer, right):
    assert spoken.is_right(skill, said, answer) == right


# ---------------------------------------------------------------- composed, and asked aloud


@pytest.fixture(scope="module")
def rows(built):
    """Of each kind of question one, written as they ship and read again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spoken_questions, "COUNTS", {"validation": 1, "test": 1})
        patch.setattr(spoken_questions, "CLIPS", 3)
        spoken_questions.write_splits(built / "questions")
    return spoken_questions.load(built / "questions", "test")


@pytest.fixture(scope="module")
def omni(built):
    specialists = {m: built / "seed1" / m for m in models.MODALITIES}
    return compose(built / "language_model", specialists, built / "omni", method="task_arithmetic")


def test_questions_are_read_as_they_were_drawn(built, rows):
    assert [row["kind"] for row in rows] == list(spoken_questions.KINDS)
    for row in rows:
        shown = telling.shown(row["skill"], "test", row["number"], spoken_questions.SEED)
        assert np.array_equal(row["exchange"].shown.image, shown.image)
        assert row["told"] == shown.told and row["exchange"].asked.heard == row["heard"]
        assert row["heard_as"].shape[1:] == (80, 2 * ear.FRAMES)
    assert len(list((built / "questions" / "clips").glob("*.wav"))) == 3
    with open(built / "questions" / "clips" / "000.wav", "rb") as file:
        again = ear.spectrograms([speech.read_wave(file)])
    assert (again - rows[0]["heard_as"]).abs().mean() < 0.02
    assert not any(
        row["unheard"] for row in spoken_questions.load(built / "questions", "validation")
    )


def test_a_spectrogram_is_kept_to_half_a_step():
    heard = torch.rand(2, 80, 2 * ear.FRAMES) * 2.9 - 1.4
    kept = spoken_questions.unpacked(spoken_questions.packed(heard))
    assert kept.shape == heard.shape
    assert (kept - heard).abs().max() <= 0.5 / spoken_questions.STEPS + 1e-6


@torch.no_grad()
def test_the_composed_model_is_the_language_model_between_both_senses(built, omni, rows):
    """Each specialist's own features in their places; layers that are no longer the base's."""
    model = OmniForConditionalGeneration.from_pretrained(omni, dtype=torch.float32).eval()
    tokenizer, row = AutoTokenizer.from_pretrained(omni), rows[0]
    inputs = evaluation.modality_inputs([row], "seen", "heard", smol.build_processor())
    tokens = ear.TOKENS * len(row["heard_as"])
    text = models.prompt(row["exchange"], "seen", "heard", tokens)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    features = {}
    for modality in models.MODALITIES:
        own = open_omni_specialist(built / "seed1" / modality)
        assert own.tokenizer.get_vocab() == tokenizer.get_vocab()
        stock = models.open_specialist(built / "specialists" / modality).eval()
        projector = {n.partition("projector.")[2]: t.float() for n, t in own.towers.items()
                     if "multi_modal_projector" in n}  # fmt: skip
        stock.model.multi_modal_projector.load_state_dict(projector)
        get = stock.get_image_features if modality == "vision" else stock.get_audio_features
        features[modality] = get(*inputs[modality].values()).pooler_output.flatten(0, -2)
    expected = model.get_input_embeddings()(ids)
    for name, modality in zip(models.places(), models.MODALITIES, strict=True):
        expected[ids == models.places()[name]] = features[modality]
    torch.testing.assert_close(model.embed(ids, inputs), expected, atol=1e-4, rtol=1e-3)
    own = dict(zip(model.specialists, model.token_kinds[0].bincount()[1:].tolist(), strict=True))
    assert own == dict(zip(models.MODALITIES, (49, tokens), strict=True))
    names = [n for n, p in model.language_model.named_parameters() if "proj" in n]
    base = AutoModelForCausalLM.from_pretrained(built / "language_model", dtype=torch.float32)
    assert any(
        not torch.equal(base.state_dict()[f"model.{n}"], model.language_model.state_dict()[n])
        for n in names
    )


@torch.no_grad()
@pytest.mark.parametrize("given", evaluation.GIVEN)
def test_the_evaluator_answers_as_the_model_does(omni, rows, given, monkeypatch):
    monkeypatch.setattr(evaluation, "LONGEST", 4)
    asked = evaluation.SpokenEvaluator(omni, rows, given, batch_size=4)
    table = asked.answer()
    assert list(table["kind"]) == list(spoken_questions.KINDS)
    picture, voice = evaluation.GIVEN[given]
    for number in (0, 7):
        row = rows[number]
        tokens = ear.TOKENS * len(row["heard_as"])
        text = models.prompt(row["exchange"], picture, voice, tokens)
        assert ("[AUDIO]" in text) == ("speech" in given) and ("<img>" in text) == (
            "picture" in given
        )
        assert (row["heard"] in text) == (given == "picture+writing")
        ids = asked.tokenizer(text, return_tensors="pt")["input_ids"]
        inputs = evaluation.modality_inputs([row], picture, voice, smol.build_processor())
        said = asked.model.generate(
            input_ids=ids, modality_inputs=inputs, max_new_tokens=4, do_sample=False,
            eos_token_id=asked.tokenizer.eos_token_id,
        )  # fmt: skip
        text = asked.tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True).strip()
        assert table["prediction"][number] == text


def test_every_seed_is_asked_once_and_told_in_tables(built, rows, tmp_path, monkeypatch):
    place = {m: str(built / "seed1" / m) for m in models.MODALITIES}
    apart = {m: str(built / "seed1" / "decoupled" / m) for m in models.MODALITIES}
    study = Recipe(
        name="smol_omni", merges="modalities", base_model=str(built / "language_model"),
        models=[{"name": m, "model": path} for m, path in place.items()],
        merge_method="task_arithmetic", scaling_coefficients=[0.5, 1.0],
        evaluation={"data": str(built / "questions"), "references": apart,
                    "validation_samples": 1, "test_samples": 1},
    )  # fmt: skip
    monkeypatch.setattr(seeds, "load_recipe", lambda recipe: study)
    monkeypatch.setattr(seeds, "MERGES", ["weight_average", "task_arithmetic"])
    seeds.main("recipe", tmp_path, seeds=[1])
    table = pd.read_csv(tmp_path / "spoken.csv")
    assert list(table) == ["seed", "who", "given", "accuracy", "low", "high", "n"]
    assert {"base_model", "vision", "speech", "weight_average", "naive_mc", "damc"} <= set(
        table.loc[table["given"] == "picture+speech", "who"]
    )
    assert set(table.loc[table["who"] == "merged", "given"]) == {*evaluation.GIVEN} - {
        "picture+speech"
    }
    assert (table["n"] == len(rows)).all() and table["accuracy"].between(0, 100).all()
    over = pd.read_csv(tmp_path / "leads.csv")
    assert set(over["over"]) == {"merged", "base_model", "vision", "speech"}
    monkeypatch.setattr(seeds, "compose", None)  # would fail if a seed were done again
    seeds.main("recipe", tmp_path, seeds=[1])
    assert pd.read_csv(tmp_path / "spoken.csv").equals(table)


def test_a_balance_weighs_the_specialists_task_vectors(built):
    study = open_study(
        Recipe(
            name="smol_omni",
            merges="modalities",
            base_model=str(built / "language_model"),
            models=[{"name": m, "model": str(built / "seed1" / m)} for m in models.MODALITIES],
        )  # fmt: skip
    )
    composed = seeds.Composed(study, {}, None)
    found = composed.task_vector("task_arithmetic, more of speech")
    for name in composed.names[:3]:
        vision, heard = (composed.own[m][name] - composed.start[name] for m in models.MODALITIES)
        torch.testing.assert_close(found[name], 0.7 * vision + 1.4 * heard, atol=1e-5, rtol=1e-4)
    table = pd.DataFrame(
        [("a", 1.0, 50.0), ("a", 0.5, 60.0), ("a, more of vision", 0.5, 60.0), ("b", 1.0, 90.0)],
        columns=["method", "scaling_coefficient", "accuracy"],
    )
    assert seeds.best_of(table, "a") == ("a", 0.5)


def test_tables_by_hand():
    right = {"one": [1, 1, 0, 0], "two": [1, 0, 0, 0]}
    answers = {
        (who, "picture+speech"): pd.DataFrame(
            {"correct": [bool(v) for v in values], "hash": list("abcd"), "kind": list("xxyy")}
        )
        for who, values in right.items()
    }
    table = evaluation.spoken_table(answers).set_index("who")
    assert table["accuracy"].to_dict() == {"one": 50, "two": 25} and (table["n"] == 4).all()
    assert table.loc["one", "low"] < 50 < table.loc["one", "high"]
    over = evaluation.leads(answers, [("two", "picture+speech")])
    assert over[["who", "over", "lead"]].values.tolist() == [["one", "two", 25]]
    assert over["low"][0] >= 0  # paired: what two is right about, so is one
    kinds = evaluation.by_kind(answers["one", "picture+speech"])
    assert kinds.to_dict() == {"x": 100, "y": 0, "Avg": 50}
