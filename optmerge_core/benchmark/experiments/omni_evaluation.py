"""Evaluation on the Omni benchmark: questions about clips, any modalities on, any weights in.

Towers, projectors and embeddings are the same under every merge, so what a prompt looks like to
the language model is computed once for each subset of modalities.
"""

import numpy as np
import pandas as pd
import torch

from optmerge_core.benchmark.evaluator import by_length
from optmerge_core.benchmark.models.omni import (
    MODALITIES,
    feature_extractor,
    image_processor,
    in_words,
    modality_inputs,
    prompt,
)
from optmerge_core.benchmark.tasks.clips import NEEDS, clip, questions
from optmerge_core.errors import extra
from optmerge_core.evaluation.answers import remembered, side_content
from optmerge_core.omni import OmniForConditionalGeneration

with extra("benchmark"):
    from transformers import AutoModelForCausalLM, AutoTokenizer

MAX_NEW_TOKENS = 4
SPLIT_SEEDS = {"validation": 301, "test": 302}
"""Split -> seed of its clips; training draws from other seeds."""


def takes_all(item, kind):
    """Whether fewer modalities than `NEEDS` says leave the answer open: not by chance in this clip.

    Where all notes have one pitch, it is the mover's too; where one thing sounds, that it stands
    still need not be seen.
    """
    if kind == "pitch of the mover":
        return len({note.pitch for note in item.notes}) > 1
    return kind != "color of the still sound" or len(item.notes) > 1


def draw_questions(split, count):
    """[(clip, question, answer, kind)]: `count` of every kind, each about a clip of its own.

    Only about clips where the question takes all the modalities that it needs.
    """
    found = {kind: [] for kind in NEEDS}
    index = 0
    while any(len(rows) < count for rows in found.values()):
        rng = np.random.default_rng([SPLIT_SEEDS[split], 12, index])
        item = clip(rng)
        open_kinds = [k for k in NEEDS if len(found[k]) < count]
        asked = [q for q in questions(item) if q[2] in open_kinds and takes_all(item, q[2])]
        if asked:
            question, answer, kind = asked[int(rng.integers(len(asked)))]
            found[kind].append((item, question, answer, kind))
        index += 1
    return [row for rows in found.values() for row in rows]


def accuracies(answers):
    """Per cent for each kind of question, and averages over kinds.

    A Series indexed by kind, then "one modality" (kinds that need one), "several" and "Avg".
    """
    kinds = 100 * answers.groupby("kind")["correct"].mean().reindex(list(NEEDS))
    alone = [kind for kind, needs in NEEDS.items() if len(needs) == 1]
    averages = {
        "one modality": kinds[alone].mean(),
        "several": kinds.drop(alone).mean(),
        "Avg": kinds.mean(),
    }
    return pd.concat([kinds, pd.Series(averages)])


def table_of(items):
    """A row for each item; `correct` once there are predictions."""
    rows = [(question, answer, kind) for _, question, answer, kind in items]
    return pd.DataFrame(rows, columns=["question", "answer", "kind"])


def judged(table, predictions):
    table = table.assign(prediction=predictions)
    return table.assign(correct=table["prediction"] == table["answer"])


@torch.inference_mode()
def answer_described(folder, items, batch_size=100):
    """What a language model answers when the clip is described to it, with all a question needs."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [prompt(q, words=in_words(clip, NEEDS[kind])) for clip, q, _, kind in items]
    predictions = np.empty(len(items), dtype=object)
    for rows in by_length(tokenizer, texts, batch_size):
        ids = tokenizer([texts[i] for i in rows], return_tensors="pt")["input_ids"]
        mask = torch.ones_like(ids)
        tokens = model.generate(
            ids, attention_mask=mask, max_new_tokens=MAX_NEW_TOKENS, do_sample=False
        )
        said = tokenizer.batch_decode(tokens[:, ids.shape[1] :], skip_special_tokens=True)
        predictions[rows] = [text.strip() for text in said]
    return judged(table_of(items), predictions)


class OmniAnswers:
    """Answers of an Omni model, its language model's weights replaced at will.

    folder: a composed model; table: a row for each question. A kind of it sets `asked`, what
    decides the answers beside the model, and says in `_predict` what the model answers.
    """

    judge = staticmethod(judged)

    def __init__(self, folder, table):
        self.model = OmniForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32
        ).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.base = {
            f"model.{n}": p.detach().clone()
            for n, p in self.model.language_model.named_parameters()
        }
        self.table, self.batches = table, []
        self.asked = [self.batches, side_content(folder)]

    @torch.inference_mode()
    def answer(self, weights=None):
        """Greedy answers with `weights` (the language model's own names) over the folder's."""
        for name, parameter in self.model.language_model.named_parameters():
            full = f"model.{name}"
            if full in self.base:  # not where `online.route` has put other layers
                parameter.copy_((weights or {}).get(full, self.base[full]))
        return self.judge(self.table, remembered(self.model, self.asked, self._predict))

    def _predict(self):
        """What the model says to every question, as it is now."""
        raise NotImplementedError


class OmniEvaluator(OmniAnswers):
    """Of questions about clips.

    items: as `draw_questions` gives them; modalities: those switched on.
    """

    def __init__(self, folder, items, modalities=MODALITIES, batch_size=100):
        super().__init__(folder, table_of(items))
        texts = [prompt(question, modalities) for question in self.table["question"]]
        processors = image_processor(), feature_extractor()
        for rows in by_length(self.tokenizer, texts, batch_size):
            ids = self.tokenizer([texts[i] for i in rows], return_tensors="pt")["input_ids"]
            inputs = modality_inputs([items[i][0] for i in rows], modalities, *processors)
            with torch.inference_mode():
                embeddings = self.model.embed(ids, inputs)
            self.batches.append((rows, ids, embeddings, self.model.token_kinds))

    def _predict(self):
        predictions = np.empty(len(self.table), dtype=object)
        for rows, ids, embeddings, kinds in self.batches:
            self.model.token_kinds = kinds
            tokens = self.model.generate(
                inputs_embeds=embeddings,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=MAX_NEW_TOKENS,
                do_sample=False,
            )
            texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
            predictions[rows] = [text.strip() for text in texts]
        return predictions
