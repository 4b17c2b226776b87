"""Evaluation on the embedded benchmark: greedy answers, each task's own metric, intervals.

All models of a family share tokenizer, embeddings, vision tower and connector (experts train the
language model's linear layers only), so the prompt's embeddings are computed once and every merged
model costs only its language model.
"""

import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import torch
from datasets import Dataset, concatenate_datasets
from datasets.table import InMemoryTable
from tqdm.auto import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

from . import models  # noqa: F401  (registers the families' processors)
from .tasks import TASKS

MAX_NEW_TOKENS = 6  # the longest answers, boxes, have five with the end


def load_split(folder, split, count=None, tasks=TASKS):
    """The shipped samples of a split, `count` per task (None: all), as one `datasets.Dataset`."""
    parts = []
    for task in tasks:
        data = Dataset(InMemoryTable(pq.read_table(Path(folder, split, f"{task}.parquet"))))
        if count is not None:
            if count > len(data):
                raise ValueError(
                    f"{folder}/{split}/{task}.parquet has {len(data)} samples, not {count}"
                )
            data = data.select(range(count))
        parts.append(data)
    return concatenate_datasets(parts)


def box_iou(first, second):
    """Intersection over union of two boxes (left, top, right, bottom)."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    overlap = max(width, 0) * max(height, 0)
    areas = [max(b[2] - b[0], 0) * max(b[3] - b[1], 0) for b in (first, second)]
    return overlap / (sum(areas) - overlap) if sum(areas) > overlap else 0.0


def is_correct(task, kind, prediction, answer):
    """The task's metric: IoU >= 0.5 (boxes), within 5 % (chart values), else exact match."""
    if answer.startswith("<loc"):
        boxes = [[int(v) for v in re.findall(r"<loc(\d+)>", text)] for text in (prediction, answer)]
        return len(boxes[0]) == 4 and box_iou(*boxes) >= 0.5
    if task == "Chart" and kind in ("value", "percent"):
        return prediction.isdecimal() and abs(int(prediction) - int(answer)) <= 0.05 * int(answer)
    return prediction == answer


def load_model(folder):
    """A benchmark checkpoint in float32, ready to answer."""
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


def load_processor(folder):
    return AutoProcessor.from_pretrained(folder)


def by_length(tokenizer, texts, batch_size):
    """Indices of texts of one length in batches, so that nothing is padded: lists of indices."""
    groups = defaultdict(list)
    for index, ids in enumerate(tokenizer(texts)["input_ids"]):
        groups[len(ids)].append(index)
    return [
        rows[start : start + batch_size]
        for rows in groups.values()
        for start in range(0, len(rows), batch_size)
    ]


class Evaluator:
    """Answers a fixed set of questions with the base model's language model replaced.

    base_folder: the family's base checkpoint; data: a dataset as `load_split` gives it.
    Prompts of one length form a batch, so there is no padding and no mask to get wrong.
    """

    def __init__(self, base_folder, data, batch_size=200):
        self.model = load_model(base_folder)
        self.tokenizer = (processor := load_processor(base_folder)).tokenizer
        self.base = {
            n: p.detach().clone() for n, p in self.model.named_parameters() if ".layers." in n
        }
        self.samples = data.remove_columns("image").to_pandas()
        parts = by_length(self.tokenizer, list(data["question"]), batch_size)
        self.batches = [
            (part, self._embed(processor, data.select(part)))
            for part in tqdm(parts, desc="prompts", leave=False)
        ]

    @torch.inference_mode()
    def _embed(self, processor, rows):
        """What `generate` takes: prompts with the features of their images in place."""
        texts = [processor.prompt(question, processor.block) for question in rows["question"]]
        ids = self.tokenizer(texts, return_tensors="pt")["input_ids"]
        pixels = np.stack([np.asarray(image) for image in rows["image"]])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        inputs |= processor.image_inputs(pixels, ids)
        grid = inputs.get("image_grid_thw")
        images = {"pixel_values": inputs.pop("pixel_values")}
        images |= {"image_grid_thw": grid} if grid is not None else {}
        features = self.model.get_image_features(**images).pooler_output
        embeddings = self.model.get_input_embeddings()(ids)
        embeddings[ids == processor.image_token_id] = torch.cat(
            [f.flatten(0, -2) for f in features]
        )
        return inputs | {"inputs_embeds": embeddings}

    def memory_name(self, name):
        """A parameter's name on disk -> in memory, where transformers names it otherwise."""
        return "model.language_model." + name[name.index("layers.") :]

    @torch.inference_mode()
    def answer(self, weights=None):
        """Greedy answers with `weights` (name on disk -> tensor) over the base; one row a sample.

        Columns: task, kind, question, answer, hash, prediction, correct.
        """
        changed = {self.memory_name(n): t for n, t in (weights or {}).items()}
        for name, parameter in self.model.named_parameters():
            if name in self.base:
                parameter.copy_(changed.pop(name, self.base[name]))
        if changed:
            raise ValueError(
                f"the base model has no {', '.join(changed)}: are these weights of another family?"
            )
        predictions = np.empty(len(self.samples), dtype=object)
        for rows, inputs in self.batches:
            tokens = self.model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
            tokens = tokens[:, inputs["input_ids"].shape[1] :]
            predictions[rows] = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        table = self.samples.assign(prediction=predictions)
        table["correct"] = [
            is_correct(*row)
            for row in table[["task", "kind", "prediction", "answer"]].itertuples(index=False)
        ]
        return table

    def merged(self, base, merged_task_vector, scaling_coefficient):
        """Answers of base + scaling_coefficient * merged task vector, rounded to float16."""
        weights = {
            n: (base[n].float() + scaling_coefficient * t).half()
            for n, t in merged_task_vector.items()
        }
        return self.answer(weights)


def accuracy(answers, tasks=TASKS):
    """Accuracy per task and their average, in per cent: a Series indexed by task, then Avg."""
    scores = 100 * answers.groupby("task")["correct"].mean().reindex(tasks)
    return pd.concat([scores, pd.Series({"Avg": scores.mean()})])
