"""What do directions that no expert has do to TSV and Iso-C, for adapters and for whole models?

`python -m optmerge_core.benchmark null-directions RECIPE OUT` writes OUT/null_directions.csv (three
minutes for the shipped recipe qwen2_vl): how experts are stored, variant, scaling coefficient and
average validation accuracy, over the recipe's grid alone, as in the paper. Adapters published as
whole models in half precision have noise where a product of factors has nothing.
"""

from pathlib import Path

import pandas as pd
import torch
from tqdm.auto import tqdm

from optmerge_core.benchmark.evaluator import evaluator_for
from optmerge_core.evaluation.metrics import accuracy
from optmerge_core.evaluation.questions import load_split
from optmerge_core.methods.registry import METHODS
from optmerge_core.study.open import open_study
from optmerge_core.study.recipe import load_recipe
from optmerge_core.task_vectors.tables import cosine, length

STORED = {"adapter": None, "float16": torch.float16, "bfloat16": torch.bfloat16}
"""How an expert is stored: as its factors, or as a whole model of a dtype."""
FILLED, NONZERO = {"null_directions": "fill"}, {"mean_over": "nonzero"}
VARIANTS = {
    "tsv": ("tsv", {}),
    "tsv, filled": ("tsv", FILLED),
    "iso_c": ("iso_c", {}),
    "iso_c, filled": ("iso_c", FILLED),
    "iso_c, mean over nonzero": ("iso_c", NONZERO),
    "iso_c, filled, mean over nonzero": ("iso_c", FILLED | NONZERO),
}
"""Label -> (method, options)."""


def published(base, task_vectors, dtype):
    """Task vectors (experts, *shape) as whole models of a dtype have them; None: as they are.

    The base (*shape) is stored in that dtype too, before the experts are trained from it.
    """
    if dtype is None:
        return task_vectors
    start = base.to(dtype).float()
    return (start + task_vectors).to(dtype).float() - start


def merge_variants(opened, stored):
    """Label -> merged task vector (name -> tensor) of `VARIANTS`, experts stored so."""
    merged = {label: {} for label in VARIANTS}
    for name, exact in opened.task_vectors().items():
        stack = published(opened.base[name], exact, STORED[stored])
        for label, (method, options) in VARIANTS.items():
            merged[label][name] = METHODS[method](stack, **options)
    return merged


def score_variants(study, count=None):
    """A row per way of storing, variant and scaling coefficient of the recipe's.

    count: validation questions a task (default: the recipe's). Columns: study, stored, variant;
    norm and cosine, beside the same method's merge of adapters by its defaults;
    scaling_coefficient, accuracy (average over the tasks, per cent). The first row, stored as
    "base_model", is the base's accuracy.
    """
    opened, size = open_study(study), study.evaluation
    data = load_split(size.data, "validation", count or size.validation_samples)
    evaluator = evaluator_for(study.base_model, data)
    row = {"study": study.name, "stored": "base_model", "scaling_coefficient": 0.0}
    rows, exact = [row | {"accuracy": accuracy(evaluator.answer())["Avg"]}], {}
    for stored in tqdm(STORED, desc=study.name):
        merged = merge_variants(opened, stored)
        exact = exact or merged
        for label, (method, _) in VARIANTS.items():
            found, own = merged[label], exact[method]
            norm = length(found) / length(own)
            row = {"study": study.name, "stored": stored, "variant": label}
            row |= {"norm": norm, "cosine": cosine(found, own)}
            for scaling in study.scaling_coefficients:
                answers = evaluator.answer_merged(opened.base, merged[label], scaling)
                score = {"scaling_coefficient": scaling, "accuracy": accuracy(answers)["Avg"]}
                rows.append(row | score)
    columns = ["study", "stored", "variant", "norm", "cosine", "scaling_coefficient", "accuracy"]
    return pd.DataFrame(rows)[columns]


def main(recipe, output, count=None):
    Path(output).mkdir(parents=True, exist_ok=True)
    table = score_variants(load_recipe(recipe), count)
    table.round(4).to_csv(Path(output, "null_directions.csv"), index=False)
