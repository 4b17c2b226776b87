"""At which learning rate are experts and mixtures trained? Each at several, scored on validation.

`python -m optmerge_core.benchmark learning-rates RECIPE OUT` trains the recipe's experts and models
of mixture training once for each rate (twenty minutes for smol, two cores) and writes
OUT/learning_rates.csv: a row per rate and model, accuracy on the tasks that it was trained on.
"""

from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm

from optmerge_core.benchmark.evaluator import evaluator_for
from optmerge_core.benchmark.experiments.seeds import trainer
from optmerge_core.checkpoints.open import open_expert
from optmerge_core.evaluation.metrics import accuracy
from optmerge_core.evaluation.questions import load_split, own_tasks, tasks_of
from optmerge_core.study.open import open_study
from optmerge_core.study.recipe import load_recipe

RATES = (5e-4, 1e-3, 2e-3)


def main(recipe, output, rates=RATES):
    study = load_recipe(recipe)
    opened, size = open_study(study), study.evaluation
    tasks = own_tasks(study) | dict.fromkeys(size.references, tasks_of(size.data))
    questions = load_split(size.data, "validation", size.validation_samples)
    evaluator, rows = evaluator_for(study.base_model, questions), []
    for rate in rates:
        anew = trainer(study, Path(output, f"{rate:g}"), learning_rate=rate)
        for name, place in tqdm((study.experts | size.references).items(), desc=f"{rate:g}"):
            model = open_expert(anew(place), opened.base)
            scores = accuracy(evaluator.answer(model, opened.names))
            rows.append((rate, name, scores[tasks[name]].mean()))
            table = pd.DataFrame(rows, columns=["learning_rate", "model", "accuracy"])
            table["accuracy"] = table["accuracy"].round(2)
            table.to_csv(Path(output, "learning_rates.csv"), index=False)
