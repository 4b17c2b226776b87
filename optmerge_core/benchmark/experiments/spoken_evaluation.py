"""Evaluation of the study `smol_omni`: spoken questions about pictures, any part off, any weights.

As with the small Omni benchmark, what a prompt looks like to the language model is computed once.
"""

import numpy as np
import pandas as pd
import torch

from optmerge_core.benchmark.experiments.omni_evaluation import OmniAnswers
from optmerge_core.benchmark.models.ear import TOKENS
from optmerge_core.benchmark.models.smol import build_processor
from optmerge_core.benchmark.models.spoken import prompt
from optmerge_core.benchmark.training.spoken import LONGEST, is_right
from optmerge_core.evaluation.verdicts import bootstrap, interval

GIVEN = {
    "picture+speech": ("seen", "heard"),
    "picture+writing": ("seen", "written"),
    "picture": ("seen", None),
    "speech": (None, "heard"),
}
"""What is given -> picture and voice as `prompt` takes them; what is off is left out."""


def table_of(rows):
    """A row for each question; `correct` once there are predictions."""
    names = ("skill", "kind", "answer", "hash", "held_out", "unheard")
    return pd.DataFrame({name: [row[name] for row in rows] for name in names})


def judged(table, predictions):
    right = map(is_right, table["skill"], predictions, table["answer"])
    return table.assign(prediction=predictions, correct=list(right))


def modality_inputs(rows, picture, voice, processor):
    """Questions -> what `OmniForConditionalGeneration` takes: modality -> its specialist's inputs.

    processor: smol's.
    """
    found = {}
    if picture == "seen":
        images = np.stack([row["exchange"].shown.image for row in rows])
        found["vision"] = processor.image_inputs(images, None)
    if voice == "heard":
        found["speech"] = {"input_features": torch.cat([row["heard_as"] for row in rows])}
    return found


class SpokenEvaluator(OmniAnswers):
    """Of spoken questions about pictures.

    rows: as `spoken_questions.load` gives them; given: a key of GIVEN.
    """

    judge = staticmethod(judged)

    def __init__(self, folder, rows, given="picture+speech", batch_size=24):
        super().__init__(folder, table_of(rows))
        picture, voice = GIVEN[given]
        processor = build_processor()
        texts = [
            prompt(row["exchange"], picture, voice, len(row["heard_as"]) * TOKENS) for row in rows
        ]
        order = np.argsort([len(ids) for ids in self.tokenizer(texts)["input_ids"]], kind="stable")
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size].tolist()
            asked = self.tokenizer(
                [texts[i] for i in part], padding=True, padding_side="left", return_tensors="pt"
            )
            inputs = modality_inputs([rows[i] for i in part], picture, voice, processor)
            with torch.inference_mode():
                embeddings = self.model.embed(asked["input_ids"], inputs)
            mask = asked["attention_mask"]
            self.batches.append((part, mask, embeddings, self.model.token_kinds))

    def _predict(self):
        predictions = np.empty(len(self.table), dtype=object)
        for rows, mask, embeddings, kinds in self.batches:
            self.model.token_kinds = kinds
            tokens = self.model.generate(
                inputs_embeds=embeddings, attention_mask=mask, max_new_tokens=LONGEST,
                do_sample=False, eos_token_id=self.tokenizer.eos_token_id,
                pad_token_id=self.tokenizer.pad_token_id,
            )  # fmt: skip
            texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
            predictions[rows] = [text.strip() for text in texts]
        return predictions


def by_kind(answers):
    """Per cent for each kind of question, and "Avg" over all questions."""
    kinds = 100 * answers.groupby("kind", sort=False)["correct"].mean()
    return pd.concat([kinds, pd.Series({"Avg": 100 * answers["correct"].mean()})])


def samples(answers):
    """Bootstrap samples of the accuracy over all questions, in per cent; paired between models."""
    return bootstrap(answers.assign(task="all"))[:, -1]


def spoken_table(answers):
    """(who, given) -> answers, as rows: who, given, accuracy, low, high (95 %), n."""
    rows = []
    for (who, given), found in answers.items():
        low, high = interval(samples(found))
        accuracy = 100 * found["correct"].mean()
        rows.append((who, given, accuracy, low, high, len(found)))
    return pd.DataFrame(rows, columns=["who", "given", "accuracy", "low", "high", "n"])


def leads(answers, floors, given="picture+speech"):
    """Of everybody over each floor, both given as (who, given): lead, low and high, in points.

    Everybody is who was `given` both; paired over the questions.
    """
    rows = []
    for (who, what), found in answers.items():
        if what != given:
            continue
        for floor in floors:
            if floor == (who, what):
                continue
            apart = samples(found) - samples(answers[floor])
            lead = 100 * (found["correct"].mean() - answers[floor]["correct"].mean())
            rows.append((who, *floor, lead, *interval(apart)))
    columns = ["who", "over", "given", "lead", "low", "high"]
    return pd.DataFrame(rows, columns=columns)
