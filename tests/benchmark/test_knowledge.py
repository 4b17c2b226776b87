"""The questions of general knowledge and the page that ship with the study `smol`."""

from pathlib import Path

import pandas as pd
import pytest

from optmerge_core.benchmark.experiments import knowledge
from optmerge_core.benchmark.models.smol import SYSTEM, build_processor
from optmerge_core.benchmark.training.chat import shipped_conversations
from optmerge_core.evaluation.forgetting import knows, prompts

SHIPPED = Path("data/benchmark/smol")


def test_ten_questions_ship_in_the_candidates_order_with_right_answers():
    table = pd.read_csv(SHIPPED / "knowledge.csv")
    assert len(table) == knowledge.COUNT == 10
    order = [list(knowledge.CANDIDATES).index(question) for question in table["question"]]
    assert order == sorted(order)
    assert all(map(knows, table["answer"], table["key"]))
    assert list(table["key"]) == [knowledge.CANDIDATES[q] for q in table["question"]]


def test_questions_are_asked_with_the_system_prompt():
    assert prompts(build_processor(), ["Why?"]) == [
        f"{SYSTEM}<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    ]


@pytest.mark.slow
def test_the_questions_that_ship_are_those_that_smollm2_answers(tmp_path):
    knowledge.write(tmp_path / "knowledge.csv")
    assert (tmp_path / "knowledge.csv").read_bytes() == (SHIPPED / "knowledge.csv").read_bytes()


def test_the_texts_are_written_as_they_ship(tmp_path, monkeypatch):
    texts = shipped_conversations()
    monkeypatch.setattr(knowledge, "language_model", lambda: "model")
    monkeypatch.setattr(knowledge, "build_tokenizer", lambda: "tokenizer")
    said = {("model", "tokenizer", len(texts)): texts}
    monkeypatch.setattr(knowledge, "conversations", lambda *given: said[given])
    monkeypatch.setattr(knowledge, "write", lambda path: path.write_text("written"))
    knowledge.main(tmp_path / "new")
    assert (tmp_path / "new" / "knowledge.csv").read_text() == "written"
    shipped = (SHIPPED / "conversations.json").read_bytes()
    assert (tmp_path / "new" / "conversations.json").read_bytes() == shipped


def test_too_few_answers_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(knowledge, "language_model", lambda: None)
    monkeypatch.setattr(
        knowledge, "chat_answers", lambda *given: ["Paris"] * len(knowledge.CANDIDATES)
    )
    with pytest.raises(ValueError, match="only 0 of 20 questions are answered"):
        knowledge.write(tmp_path / "knowledge.csv")
