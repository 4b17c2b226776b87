"""All methods on one study alike: λ from one search, length controlled, forgetting beside.

`python -m optmerge_core.benchmark comparison RECIPE OUT` merges the recipe's experts by every
method of `variants` for every seed (trained anew but for the shipped one, as `seeds` does it) and
writes OUT/comparison.csv: a row per seed and method with seconds, validation accuracy and the
number of λ tried, length of λ τm beside the sum of the task vectors and cosine with it, test
accuracy a task, that of the sum at the same length (control), and the loss on captions, which the
base learnt and no expert was trained for. OUT/correct.parquet says of every test question whether
it was answered right. A seed that is done is not done again.
"""

from pathlib import Path
from time import perf_counter

import pandas as pd
import torch
from tqdm.auto import tqdm

from optmerge_core.benchmark.experiments.seeds import evaluators, trained
from optmerge_core.benchmark.experiments.variants import beyond
from optmerge_core.benchmark.shipped import sampler
from optmerge_core.benchmark.tasks.samples import TASKS
from optmerge_core.benchmark.training.build import SEEDS
from optmerge_core.benchmark.training.loop import Collate
from optmerge_core.checkpoints.open import open_expert
from optmerge_core.evaluation.metrics import accuracy
from optmerge_core.evaluation.selection import best_scaling, search_scaling
from optmerge_core.methods import EXPERTS, FILES
from optmerge_core.study.open import open_study
from optmerge_core.study.recipe import load_recipe
from optmerge_core.task_vectors.stack import apply
from optmerge_core.task_vectors.tables import cosine, length

CALIBRATED = ("task_arithmetic", "tsv")
CAPTIONS = 32
"""of each task, drawn from the validation stream"""


def variants(study, methods=None):
    """Label -> (method, options): all that merge any number of experts, some calibrated, `beyond`.

    methods: labels to keep, in their order; `ValueError` for one that there is not.
    """
    found = {m: (m, study.options(m)) for m in FILES if m not in EXPERTS}
    found |= {f"{m}, SVC": (m, study.options(m) | {"then": "svc"}) for m in CALIBRATED}
    found |= beyond()
    if unknown := set(methods or ()) - found.keys():
        raise ValueError(f"no variant {', '.join(sorted(unknown))}; there are {', '.join(found)}")
    return {m: found[m] for m in methods} if methods else found


class Captions:
    """The mean loss of a model on captions of every task's pictures, in nats a token."""

    def __init__(self, study, evaluator, count=CAPTIONS):
        draw, collate = sampler(study), Collate(evaluator.processor)
        pictures = [[draw(t, "validation", i, "caption") for i in range(count)] for t in TASKS]
        self.batches, self.evaluator = [collate(samples) for samples in pictures], evaluator

    @torch.inference_mode()
    def __call__(self, weights=None):
        """weights: name -> tensor or pairs of them, over the base's."""
        self.evaluator.hold(weights)
        losses = [self.evaluator.model(**batch).loss.item() for batch in self.batches]
        return sum(losses) / len(losses)


def rows_of(study, validation, test, captions, methods=None):
    """One seed: a row for each model of `variants`, the experts, references and base; its answers.

    captions: a function of weights, as `Captions` is. Columns are those of comparison.csv.
    """
    opened = open_study(study)
    base, names = opened.base, opened.names
    total = opened.merge_tensors("task_arithmetic")
    others = {n: open_expert(place, base) for n, place in study.evaluation.references.items()}
    rows, answers = [], {"base_model": test.answer()}
    rows.append({"model": "base_model", "captions": captions()})
    for name, model in (opened.experts | others).items():
        own = {n: model[n] for n in names}
        answers[name] = test.answer(own)
        rows.append({"model": name, "captions": captions(own)})
    for label, (method, options) in tqdm(variants(study, methods).items(), desc="methods"):
        begun = perf_counter()
        merged = opened.merge_tensors(method, method_options=options)
        row = {"model": label, "seconds": perf_counter() - begun}

        def score(_, scaling, merged=merged):
            return accuracy(validation.answer_merged(base, merged, scaling))["Avg"]

        search = search_scaling(score, [label], study.scaling_coefficients)
        scaling = best_scaling(search)[label]
        share = scaling * length(merged) / length(total)
        answers[label] = test.answer_merged(base, merged, scaling)
        row |= {"trials": len(search), "validation": search["accuracy"].max()}
        row |= {"scaling_coefficient": scaling, "length": share, "cosine": cosine(merged, total)}
        row["control"] = accuracy(test.answer_merged(base, total, share))["Avg"]
        row["captions"] = captions((n, apply(base[n], merged[n], scaling)) for n in names)
        rows.append(row)
    scores = pd.DataFrame({model: accuracy(found) for model, found in answers.items()}).T
    return pd.DataFrame(rows).set_index("model").join(scores), answers


def main(recipe, output, seeds=SEEDS, methods=None):
    study, tables, correct = load_recipe(recipe), {}, {}
    validation, test = evaluators(study)
    captions = Captions(study, validation)
    for seed in tqdm(seeds, desc="seeds"):
        folder = Path(output, f"seed{seed}")
        done = folder / "comparison.csv", folder / "correct.parquet"
        if not done[1].exists():
            models = trained(study, folder, seed)
            table, answers = rows_of(models, validation, test, captions, methods)
            folder.mkdir(parents=True, exist_ok=True)
            table.to_csv(done[0])
            right = pd.concat({m: a[["task", "correct"]] for m, a in answers.items()})
            right.rename_axis(["model", "question"]).to_parquet(done[1])
        tables[seed] = pd.read_csv(done[0], index_col="model")
        correct[seed] = pd.read_parquet(done[1])
    Path(output).mkdir(parents=True, exist_ok=True)
    table = pd.concat(tables, names=["seed"])
    table.to_csv(Path(output, "comparison.csv"), float_format="%.6g")
    pd.concat(correct, names=["seed"]).to_parquet(Path(output, "correct.parquet"))
