"""Evaluation: greedy answers, each task's own metric, intervals.

All models of an embedded family share tokenizer, embeddings, vision tower and connector (experts
train the language model's linear layers only), so a prompt's embeddings are computed once and every
merged model costs only its language model. Any other checkpoint is asked as `chat.py` says, in its
own dtype, and computes all of itself for every answer.
"""

import copy
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import AutoModelForImageTextToText

from optmerge_core.benchmark.models.family import Prompts
from optmerge_core.checkpoints.names import closest_names
from optmerge_core.checkpoints.open import open_checkpoint
from optmerge_core.evaluation import chat
from optmerge_core.evaluation.metrics import is_correct, is_right
from optmerge_core.runtime import in_order, parse_device
from optmerge_core.task_vectors.stack import apply

MAX_NEW_TOKENS = 6  # the longest answers, boxes, have five with the end


def load_model(folder, dtype=torch.float32, trust_remote_code=False):
    """A checkpoint's model, ready to answer: an embedded one in float32, a real one in "auto".

    Raises `ValueError` where transformers has no class of its kind.
    """
    try:
        model = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=dtype, trust_remote_code=trust_remote_code
        )
    except ValueError as error:
        raise ValueError(
            f"{folder}: AutoModelForImageTextToText does not open it ({str(error).splitlines()[0]})"
            "; use the checkpoint's conversion to transformers, often named ...-hf, or let the "
            "recipe say trust_remote_code: true"
        ) from error
    return model.eval()


def load_processor(folder, trust_remote_code=False):
    return chat.load_processor(Path(folder), trust_remote_code)


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
    """Answers a fixed set of questions with the base model's weights replaced at will.

    base_model: a folder or hub id; data: questions as `load_split` gives them. A model of an
    embedded family answers in float32 on the CPU, whatever the device, so that its scores are the
    same everywhere. Any other answers on `device` in its own dtype, the weights replaced in place
    and the base's read again from its files: beside the model nothing is kept.

    Raises `ValueError` for a model that transformers does not open as one for images and text.
    """

    def __init__(self, base_model, data, batch_size=None, device="auto", trust_remote_code=False):
        self.base = open_checkpoint(base_model)
        self.processor = load_processor(self.base.folder, trust_remote_code)
        self.tokenizer = self.processor.tokenizer
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.embedded = isinstance(self.processor, Prompts) and (
            "<loc0>" in self.tokenizer.get_vocab()
        )
        self.device = torch.device("cpu") if self.embedded else parse_device(device)
        self.batch_size = batch_size or (200 if self.embedded else 16)
        dtype = torch.float32 if self.embedded else "auto"
        self.model = load_model(self.base.folder, dtype, trust_remote_code).to(self.device)
        self._parameters = dict(self.model.named_parameters())
        self._places, self._changed = {}, set()  # name on disk -> parameter; not the base's now
        self._ask(data)

    def asking(self, data):
        """An evaluator of the same model, which is not loaded again, for other questions."""
        other = copy.copy(self)
        other._ask(data)
        return other

    def _ask(self, data):
        self.samples = data.remove_columns("image").to_pandas()
        self._data = data
        if self.embedded:
            parts = by_length(self.tokenizer, list(data["question"]), self.batch_size)
            self.batches = [
                (part, self._embed(self.processor, data.select(part)))
                for part in tqdm(parts, desc="prompts", leave=False)
            ]
            return
        # Neighbours in length, so that little is padded.
        order = self.samples["question"].str.len().to_numpy().argsort(kind="stable")
        self.batches = [
            order[start : start + self.batch_size].tolist()
            for start in range(0, len(order), self.batch_size)
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

    def _prepared(self):
        """The batches of a real checkpoint, (rows, inputs); the next ones while one is answered."""

        def prepare(rows):
            return chat.prepare(self.processor, list(self._data.select(rows)))

        prepared = in_order(prepare, self.batches, self.device)
        for rows, inputs in zip(self.batches, prepared, strict=True):
            yield rows, inputs.to(self.device, self.model.dtype)

    def memory_name(self, name):
        """A parameter's name on disk -> in memory, where transformers names it otherwise."""
        found = closest_names(name, self._parameters)
        if len(found) != 1:
            raise ValueError(
                f"the base model has no {name}: are these weights of another family?"
                if not found
                else f"{name} on disk may be any of {', '.join(found)} in memory"
            )
        return found[0]

    def _place(self, name):
        """The parameter that a name on disk stands for, once seen to hold what is there."""
        if name not in self._places:
            parameter = self._parameters[self.memory_name(name)]
            stored = self.base.get(name)
            if not self.embedded and (
                stored is None or not torch.equal(parameter.cpu(), stored.to(parameter.dtype))
            ):
                raise ValueError(
                    f"{name}: {type(self.model).__name__} does not hold the checkpoint's values "
                    "where it was looked for; such a model can be merged, not evaluated here"
                )
            self._places[name] = parameter
        return self._places[name]

    @torch.inference_mode()
    def _replace(self, pairs):
        """The base model with the parameters of `pairs`, (name on disk, tensor), replaced."""
        restored = set(self._changed)
        for name, tensor in pairs:
            parameter = self._place(name)
            if parameter.shape != tensor.shape:
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}, the base model's "
                    f"{tuple(parameter.shape)}: are these weights of another family?"
                )
            if self.embedded and "layers." not in name and (parameter != tensor).any():
                raise ValueError(
                    f"{name}: the evaluator of an embedded family replaces its language model's "
                    "layers alone; this one is not the base's"
                )
            self._changed.add(name)
            parameter.copy_(tensor)
            restored.discard(name)
        for name in restored:
            self._place(name).copy_(self.base[name])
            self._changed.discard(name)

    @torch.inference_mode()
    def answer(self, weights=None, names=None):
        """Greedy answers with `weights` over the base's; one row a sample.

        weights: name on disk -> tensor, such as a state dict, an opened checkpoint or adapter, of
        which those in `names` are read one by one (default: all); or pairs of a name and a tensor.
        Columns: task, kind, question, answer, hash (the embedded questions'), prediction, correct.
        """
        if isinstance(weights, Mapping):
            mapping = weights
            weights = ((name, mapping[name]) for name in (mapping if names is None else names))
        self._replace(weights or ())
        predictions = np.empty(len(self.samples), dtype=object)
        options = {"do_sample": False, "pad_token_id": self.tokenizer.pad_token_id}
        options["max_new_tokens"] = MAX_NEW_TOKENS if self.embedded else chat.MAX_NEW_TOKENS
        for rows, inputs in self.batches if self.embedded else self._prepared():
            tokens = self.model.generate(**inputs, **options)
            tokens = tokens[:, inputs["input_ids"].shape[1] :]
            predictions[rows] = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        table = self.samples.assign(prediction=predictions)
        judge = is_correct if self.embedded else is_right
        table["correct"] = [
            judge(*row)
            for row in table[["task", "kind", "prediction", "answer"]].itertuples(index=False)
        ]
        return table

    def merged(self, base, merged_task_vector, scaling_coefficient):
        """Answers of base + scaling_coefficient * merged task vector, rounded as `merge` stores it.

        base: name on disk -> tensor; merged_task_vector: the same, or pairs of a name and a tensor,
        computed one by one.
        """
        vectors = merged_task_vector
        pairs = vectors.items() if isinstance(vectors, Mapping) else vectors
        return self.answer(
            (name, apply(base[name], tau.to(self.device), scaling_coefficient))
            for name, tau in pairs
        )
