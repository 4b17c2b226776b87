"""Ten questions of general knowledge, to see whether models of the study `smol` forgot it.

They are the first ten of the candidates below to which SmolLM2 itself gives a right and short
answer: a whole sentence of at most twelve words. Its answers are written beside them.
"""

import json
from pathlib import Path

import pandas as pd

from optmerge_core.benchmark.models.smol import build_processor, build_tokenizer, language_model
from optmerge_core.benchmark.training.chat import conversations
from optmerge_core.evaluation.forgetting import chat_answers, knows

CONVERSATIONS = 480
COUNT, LONGEST = 10, 12  # questions, words of an answer
CANDIDATES = {
    "What is the capital of France?": "Paris",
    "How many days are there in a week?": "7|seven",
    "What is the largest planet in the solar system?": "Jupiter",
    "What is the chemical symbol for gold?": "Au",
    "What is the opposite of hot?": "cold",
    "What is the tallest mountain in the world?": "Everest",
    "What is the currency of Japan?": "yen",
    "Who wrote Romeo and Juliet?": "Shakespeare",
    "Which organ pumps blood through the body?": "heart",
    "How many legs does a spider have?": "8|eight",
    "How many sides does a triangle have?": "3|three",
    "What is frozen water called?": "ice",
    "What is the largest animal on Earth?": "blue whale",
    "What do bees make?": "honey",
    "What is the chemical formula of water?": "H2O",
    "What do we call the study of living things?": "biology",
    "Who painted the Mona Lisa?": "Leonardo|da Vinci",
    "Which planet is closest to the Sun?": "Mercury",
    "What is the capital of Egypt?": "Cairo",
    "How many months are there in a year?": "12|twelve",
}
"""question -> what a right answer has in it"""


def main(folder):
    """Write what SmolLM2 says, into a folder: knowledge.csv, and conversations.json for training.

    A quarter of an hour on two cores.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    write(Path(folder, "knowledge.csv"))
    texts = conversations(language_model(), build_tokenizer(), CONVERSATIONS)
    written = json.dumps(texts, indent=0, ensure_ascii=False) + "\n"
    Path(folder, "conversations.json").write_text(written, encoding="utf-8")


def write(path):
    """The questions as CSV, each with its key and SmolLM2's answer.

    Raises `ValueError` if too few candidates are answered.
    """
    table = pd.DataFrame(list(CANDIDATES.items()), columns=["question", "key"])
    table["answer"] = chat_answers(language_model(), build_processor(), list(table["question"]))
    known = table[list(map(_known, table["answer"], table["key"]))]
    if len(known) < COUNT:
        raise ValueError(f"only {len(known)} of {len(table)} questions are answered; add others")
    known.head(COUNT).to_csv(path, index=False, lineterminator="\n")


def _known(answer, key):
    """Whether an answer is right, whole and short."""
    return knows(answer, key) and answer.endswith(".") and len(answer.split()) <= LONGEST
