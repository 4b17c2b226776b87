"""Questions to the benchmark's own models, the fast way; `evaluator_for` takes it where it can.

All models of a study share tokenizer, embeddings, vision tower and connector (experts train the
language model's linear layers only), so what comes before the layers is computed once and every
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


def evaluator_for(base_model, data, device="auto", trust_remote_code=False, processor=None):
    """The evaluator of a base model, a folder or hub id: of any checkpoint, or the fast one.

    data: questions as `load_split` gives them; processor: whose asks them, as an opened study has
    it (default: the base model's). The benchmark's own models answer on the CPU,
    whatever the device, so that their scores are the same everywhere.
    """
    base = open_checkpoint(base_model)
    if processor_class(base.folder) not in PROCESSORS:
        options = {"trust_remote_code": trust_remote_code, "processor": processor}
        return Evaluator(base_model, data, device=device, **options)
    real = base.config()["text_config"]["model_type"] == "llama"  # SmolLM2
    kind = SmolEvaluator if real else EmbeddedEvaluator
    return kind(base_model, data, processor=processor)


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


class LayersEvaluator(Evaluator):
    """An `Evaluator` in float32 on the CPU, of weights that are the base's but for its layers.

    bfloat16 would not do: it rounds away 0.5 to 0.7 of an expert of 0.2 to 0.3 % of SmolLM2's norm
    (float16, in which a merged model is stored: 0.07 to 0.1).
    """

    dtype = torch.float32

    def __init__(self, base_model, data, batch_size=None, processor=None):
        size = batch_size or self.batch_size
        super().__init__(base_model, data, size, device="cpu", processor=processor)

    def inputs(self, row):
        return self._prompts(self.questions.select([row]))

    def _prompts(self, rows):
        """What `generate` takes for rows whose prompts are of one length."""
        texts = [self.processor.prompt(q, self.processor.block) for q in rows["question"]]
        ids = self.tokenizer(texts, return_tensors="pt")["input_ids"]
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return inputs | self._pixels(rows["image"], ids)

    def seen(self, inputs):
        """What is left for the layers to compute: pictures' features are in their places."""
        given = self._embed(inputs)
        ids, grid = given.pop("input_ids"), given.pop("image_grid_thw", None)
        if grid is not None:
            given["position_ids"] = self.model.model.compute_3d_position_ids(
                ids, given["inputs_embeds"], grid,
                attention_mask=given["attention_mask"],
                mm_token_type_ids=given.pop("mm_token_type_ids"),
            )  # fmt: skip
        return given

    @torch.no_grad()
    def _embed(self, inputs):
        """What `generate` takes: prompts with the features of their pictures in place."""
        ids, grid = inputs["input_ids"], inputs.get("image_grid_thw")
        images = {"pixel_values": inputs["pixel_values"]}
        images |= {"image_grid_thw": grid} if grid is not None else {}
        features = self.model.get_image_features(**images).pooler_output
        embeddings = self.model.get_input_embeddings()(ids)
        embeddings[ids == self.processor.image_token_id] = torch.cat(
            [f.flatten(0, -2) for f in features]
        )
        others = {key: x for key, x in inputs.items() if key != "pixel_values"}
        return others | {"inputs_embeds": embeddings}

    def _check(self, name, parameter, tensor):
        super()._check(name, parameter, tensor)
        if "layers." not in name and (parameter != tensor).any():
            raise ValueError(
                f"{name}: the evaluator of an embedded family replaces its language model's "
                "layers alone; this one is not the base's"
            )


class EmbeddedEvaluator(LayersEvaluator):
    """Of the two tiny families: prompts are kept as embeddings, answers read to the letter."""

    batch_size = 200
    max_new_tokens = 6  # the longest answers, boxes, have five with the end
    is_correct = staticmethod(is_correct)

    def _ask(self, data):
        super()._ask(data)
        parts = by_length(self.tokenizer, list(data["question"]), self.batch_size)
        self._embedded = [
            (part, self._embed(self._prompts(data.select(part))))
            for part in tqdm(parts, desc="prompts", leave=False)
        ]

    def _batches(self):
        return self._embedded

    def _pixels(self, images, ids):
        pixels = np.stack([np.asarray(image) for image in images])
        return self.processor.image_inputs(pixels, ids)


class SmolEvaluator(LayersEvaluator):
    """Of SmolLM2 with eyes: what its 135 M parameters compute for an answer is spared where it can.

    Kept are the features of each picture, 113 kB. The keys and values of a picture are computed
    once for a batch's questions about it, and an answer that has ended leaves its batch.
    """

    batch_size = 48
    max_new_tokens = 18  # a box has twelve with the end, three words in capitals to read up to 16

    def _ask(self, data):
        super()._ask(data)
        processor, distinct = self.processor, {}
        texts = [processor.prompt(question, processor.block) for question in data["question"]]
        ids = self.tokenizer(texts)["input_ids"]
        start = ids[0].index(processor.end_image_token_id) + 1  # alike for all, but for features
        self._start, self._questions = torch.tensor(ids[0][:start]), [row[start:] for row in ids]
        numbers = [distinct.setdefault(content, len(distinct)) for content in self._asked[1]]
        self._picture, rows = np.array(numbers), np.unique(numbers, return_index=True)[1]
        parts = [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
        features = [self._see(data.select(p)) for p in tqdm(parts, "pictures", leave=False)]
        self._features = torch.cat(features)
        # One picture's questions together, and pictures with neighbours in length.
        longest = np.zeros(len(rows), dtype=int)
        np.maximum.at(longest, self._picture, [len(row) for row in self._questions])
        self._order = np.lexsort([self._picture, longest[self._picture]])

    def _pixels(self, images, ids=None):
        pictures = self.processor.image_processor(list(images), return_tensors="pt")
        return {"pixel_values": pictures["pixel_values"]}

    @torch.inference_mode()
    def _see(self, rows):
        """Features of the pictures of some rows: (pictures, image tokens, width)."""
        return self.model.get_image_features(**self._pixels(rows["image"])).pooler_output

    def _predict(self):
        predictions = np.empty(len(self.samples), dtype=object)
        for start in range(0, len(predictions), self.batch_size):
            rows = self._order[start : start + self.batch_size]
            pictures, own = np.unique(self._picture[rows], return_inverse=True)
            cache = self._read(self._features[pictures])
            cache.batch_select_indices(torch.from_numpy(own))
            tokens = self._say([self._questions[row] for row in rows], cache)
            predictions[rows] = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return predictions

    def _read(self, features):
        """Keys and values of what stands before a question, for each picture's features."""
        ids = self._start.expand(len(features), -1)
        embeddings = self.model.get_input_embeddings()(ids)
        embeddings[ids == self.processor.image_token_id] = features.flatten(0, 1)
        language_model = self.model.model.language_model
        return language_model(inputs_embeds=embeddings, use_cache=True).past_key_values

    def _say(self, questions, cache):
        """Greedy tokens after questions, lists of ids; cache: keys and values of what is before.

        The shorter questions are padded between picture and question, where nothing looks.
        """
        given = self.tokenizer.pad({"input_ids": questions}, padding_side="left")
        ids, mask = torch.tensor(given["input_ids"]), torch.tensor(given["attention_mask"])
        before = mask.new_ones(len(mask), cache.get_seq_length())
        positions = before.shape[1] + mask.cumsum(1) - 1
        mask, rows, said = torch.cat([before, mask], 1), torch.arange(len(ids)), [[] for _ in ids]
        for _ in range(self.max_new_tokens):
            hidden = self.model.model.language_model(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache
            ).last_hidden_state
            tokens = self.model.lm_head(hidden[:, -1]).argmax(-1)
            for row, token in zip(rows.tolist(), tokens.tolist(), strict=True):
                said[row].append(token)
            on = tokens != self.tokenizer.eos_token_id
            if not on.any():
                break
            if not on.all():
                cache.batch_select_indices(on)
            rows, ids, positions = rows[on], tokens[on, None], positions[on, -1:] + 1
            mask = torch.cat([mask[on], mask[on, -1:]], 1)
        return said
