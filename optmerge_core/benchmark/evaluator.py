"""Questions to the embedded families, the fast way; `evaluator_for` takes it where it can.

All models of an embedded family share tokenizer, embeddings, vision tower and connector (experts
train the language model's linear layers only), so a prompt's embeddings are computed once and every
merged model costs only its language model.
"""

import re
from collections import defaultdict

import numpy as np
import torch
from tqdm.auto import tqdm

from optmerge_core.benchmark.models.registry import PROCESSORS
from optmerge_core.checkpoints.open import open_checkpoint
from optmerge_core.evaluation.chat import processor_class
from optmerge_core.evaluation.evaluator import Evaluator
from optmerge_core.evaluation.metrics import Box, box_iou


def evaluator_for(base_model, data, device="auto", trust_remote_code=False):
    """The evaluator of a base model, a folder or hub id: of any checkpoint, or the fast one.

    data: questions as `load_split` gives them. A model of an embedded family answers on the CPU,
    whatever the device, so that its scores are the same everywhere.
    """
    if processor_class(open_checkpoint(base_model).folder) in PROCESSORS:
        return EmbeddedEvaluator(base_model, data)
    return Evaluator(base_model, data, device=device, trust_remote_code=trust_remote_code)


def is_correct(metric, prediction, answer):
    """An embedded model's answer, read to the letter; a box is four location tokens."""
    if isinstance(metric, Box):
        boxes = [[int(v) for v in re.findall(r"<loc(\d+)>", text)] for text in (prediction, answer)]
        return len(boxes[0]) == 4 and box_iou(*boxes) >= 0.5
    return metric(prediction, answer)


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


class EmbeddedEvaluator(Evaluator):
    """An `Evaluator` in float32 on the CPU, of weights that are the base's but for its layers."""

    dtype = torch.float32
    max_new_tokens = 6  # the longest answers, boxes, have five with the end
    is_correct = staticmethod(is_correct)

    def __init__(self, base_model, data, batch_size=200):
        super().__init__(base_model, data, batch_size, device="cpu")

    def _ask(self, data):
        super()._ask(data)
        parts = by_length(self.tokenizer, list(data["question"]), self.batch_size)
        self._embedded = [
            (part, self._embed(data.select(part)))
            for part in tqdm(parts, desc="prompts", leave=False)
        ]

    def _batches(self):
        return self._embedded

    @torch.inference_mode()
    def _embed(self, rows):
        """What `generate` takes: prompts with the features of their images in place."""
        processor = self.processor
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

    def _check(self, name, parameter, tensor):
        super()._check(name, parameter, tensor)
        if "layers." not in name and (parameter != tensor).any():
            raise ValueError(
                f"{name}: the evaluator of an embedded family replaces its language model's "
                "layers alone; this one is not the base's"
            )
