"""What a model has kept of its base that no expert was trained for."""

from pathlib import Path

import pandas as pd
import torch

from optmerge_core.benchmark.models.smol import build_processor, language_model
from optmerge_core.benchmark.shipped import sampler
from optmerge_core.benchmark.tasks.samples import TASKS
from optmerge_core.benchmark.training.loop import Collate
from optmerge_core.evaluation.forgetting import Forgetting

CAPTIONS = 16
"""of each task, drawn from the validation stream"""


class Captions:
    """The mean loss of a model on captions of every task's pictures, in nats a token."""

    def __init__(self, study, processor, count=CAPTIONS):
        draw, collate = sampler(study), Collate(processor)
        pictures = [[draw(t, "validation", i, "caption") for i in range(count)] for t in TASKS]
        self.batches = [collate(samples) for samples in pictures]

    @torch.inference_mode()
    def __call__(self, model):
        losses = [model(**batch).loss.item() for batch in self.batches]
        return sum(losses) / len(losses)


def kept_by(study, evaluator):
    """A function of weights, name -> tensor or pairs of them over the base's (None: the base).

    It returns name -> number: the loss on captions, which the base learnt and no expert was trained
    for; of the study smol also what `Forgetting` tells, beside SmolLM2 itself.
    """
    processor = evaluator.processor
    captions, told, place = Captions(study, processor), None, Path(study.base_model).parent
    if (place / "knowledge.csv").exists():
        page = (place / "page.txt").read_text(encoding="utf-8")
        questions = pd.read_csv(place / "knowledge.csv")
        told = Forgetting(language_model(), build_processor(), questions, page)

    def kept(weights=None):
        evaluator.hold(weights)
        found = {"captions": captions(evaluator.model)}
        return found | told(evaluator.model, processor)[1] if told else found

    return kept
