"""Evaluation: greedy answers of a checkpoint whose weights are replaced at will.

Any checkpoint is asked as `chat.py` says, in its own dtype, and computes all of itself for every
answer. The benchmark's own models have a faster way, `benchmark/evaluator.py`.
"""

import copy
import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from optmerge_core.checkpoints.names import closest_names
from optmerge_core.checkpoints.open import open_checkpoint
from optmerge_core.errors import extra
from optmerge_core.evaluation import answers, chat
from optmerge_core.evaluation.metrics import is_correct, metric_of
from optmerge_core.merging.processor import Processor
from optmerge_core.runtime import in_order, parse_device
from optmerge_core.task_vectors.stack import apply

with extra("datasets"):
    from datasets import Image
with extra("models"):
    from transformers import AutoModelForImageTextToText


def load_model(folder, dtype=torch.float32, trust_remote_code=False):
    """A checkpoint's model, ready to answer; dtype "auto" is its own.

    Raises `ValueError` where transformers has no class of its kind.
    """
    try:
        model = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=dtype, trust_remote_code=trust_remote_code
        )
    except ValueError as error:
        allow = "" if trust_remote_code else ", or let the recipe say trust_remote_code: true"
        raise ValueError(
            f"{folder}: AutoModelForImageTextToText does not open it ({str(error).splitlines()[0]})"
            f"; use the checkpoint's conversion to transformers, often named ...-hf{allow}"
        ) from error
    return model.eval()


class Evaluator:
    """Answers a fixed set of questions with the base model's weights replaced at will.

    base_model: a folder or hub id; data: questions as `load_split` gives them. It answers on
    `device` in its own dtype, the weights replaced in place and the base's read again from its
    files: beside the model nothing is kept. `processor`, a `merging.processor.Processor`, says
    whose processor and chat template ask (default: the base's).

    Raises `ValueError` for a model that transformers does not open as one for images and text, and
    for a chat template that makes empty prompts.
    """

    dtype = "auto"
    max_new_tokens = 64  # a box in JSON, digit by digit, takes about 45
    is_correct = staticmethod(is_correct)

    def __init__(
        self,
        base_model,
        data,
        batch_size=16,
        device="auto",
        trust_remote_code=False,
        processor=None,
    ):
        self.base = open_checkpoint(base_model)
        own = processor or Processor(folder=self.base.folder)
        self.processor = chat.load_processor(own.folder, trust_remote_code, own.template)
        chat.check_prompts(self.processor, own.folder)
        folders = dict.fromkeys((self.base.folder, own.folder))
        self._said = [*map(answers.side_content, folders), own.template]
        self.tokenizer = self.processor.tokenizer
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.device, self.batch_size = parse_device(device), batch_size
        self.model = load_model(self.base.folder, self.dtype, trust_remote_code).to(self.device)
        self._parameters = dict(self.model.named_parameters())
        self._places, self._changed = {}, set()  # name on disk -> parameter; not the base's now
        self._ask(data)

    def asking(self, data):
        """An evaluator of the same model, which is not loaded again, for other questions."""
        other = copy.copy(self)
        other._ask(data)
        return other

    def _ask(self, data):
        self.questions = data
        self.samples = data.remove_columns("image").to_pandas()
        self._metrics = [metric_of(sample) for sample in self.samples.to_dict("records")]
        images = data.cast_column("image", Image(decode=False))["image"]
        pixels = [image["bytes"] or Path(image["path"]).read_bytes() for image in images]
        if "hash" not in self.samples:
            hashes = [hashlib.blake2b(content, digest_size=8).hexdigest() for content in pixels]
            self.samples["hash"] = hashes
        self._asked = [self.samples.to_json(), pixels, self._said]

    def _batches(self):
        """(rows, what `generate` takes); the next ones are prepared while one is answered."""
        # Neighbours in length, so that little is padded.
        order = self.samples["question"].str.len().to_numpy().argsort(kind="stable")
        batches = [
            order[start : start + self.batch_size].tolist()
            for start in range(0, len(order), self.batch_size)
        ]

        def prepare(rows):
            return chat.prepare(self.processor, list(self.questions.select(rows)))

        prepared = in_order(prepare, batches, self.device)
        for rows, inputs in zip(batches, prepared, strict=True):
            yield rows, inputs.to(self.device, self.model.dtype)

    def inputs(self, row):
        """What `generate` takes for the question of one row, prompt and picture as they are."""
        inputs = chat.prepare(self.processor, [self.questions[row]])
        return inputs.to(self.device, self.model.dtype)

    def seen(self, inputs):
        """The same with what does not change under any merge computed already, if it can be."""
        return inputs

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
            if stored is None or not torch.equal(parameter.cpu(), stored.to(parameter.dtype)):
                raise ValueError(
                    f"{name}: {type(self.model).__name__} does not hold the checkpoint's values "
                    "where it was looked for; such a model can be merged, not evaluated here"
                )
            self._places[name] = parameter
        return self._places[name]

    def _check(self, name, parameter, tensor):
        """Raises `ValueError` where a tensor cannot take a parameter's place."""
        if parameter.shape != tensor.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, the base model's "
                f"{tuple(parameter.shape)}: are these weights of another family?"
            )

    @torch.inference_mode()
    def hold(self, weights=None, names=None):
        """Let `model` be the base with `weights` in their place; takes what `answer` does."""
        if isinstance(weights, Mapping):
            mapping = weights
            weights = ((name, mapping[name]) for name in (mapping if names is None else names))
        restored = set(self._changed)
        for name, tensor in weights or ():
            parameter = self._place(name)
            self._check(name, parameter, tensor)
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
        Columns: task, kind, question, answer, hash (of the picture), prediction, correct.
        """
        self.hold(weights, names)
        way = type(self).__name__, self.max_new_tokens, self.batch_size, self.device.type
        predictions = answers.remembered(self.model, (self._asked, way), self._predict)
        table = self.samples.assign(prediction=predictions)
        rows = zip(self._metrics, predictions, table["answer"], strict=True)
        table["correct"] = [self.is_correct(*row) for row in rows]
        return table

    def _predict(self):
        """What the model says to every question, as it is now."""
        predictions = np.empty(len(self.samples), dtype=object)
        options = {"do_sample": False, "pad_token_id": self.tokenizer.pad_token_id}
        for rows, inputs in self._batches():
            tokens = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, **options)
            tokens = tokens[:, inputs["input_ids"].shape[1] :]
            predictions[rows] = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return predictions

    def answer_merged(self, base, merged_task_vector, scaling_coefficient):
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
