"""The modality study for every training seed: how far do Table 5's results scatter?

`python -m optmerge_core.benchmark omni-seeds RECIPE OUT` merges and evaluates the specialists of
every seed as notebook 04 does (the shipped seed's from the recipe, the others', trained by
`omni-train`, from OUT/seed<n>) and writes OUT/seeds.csv: a row per seed and model, test accuracy
per kind of question.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
from tqdm.auto import tqdm

from optmerge_core.benchmark.experiments.omni_evaluation import (
    OmniEvaluator,
    accuracies,
    draw_questions,
)
from optmerge_core.benchmark.experiments.seeds import write
from optmerge_core.benchmark.training.build import SEEDS
from optmerge_core.evaluation.selection import best_scaling, search_scaling
from optmerge_core.methods import TABLE_METHODS
from optmerge_core.omni import compose
from optmerge_core.omni.online import TEXT, online_weights, route
from optmerge_core.omni.specialists import open_specialist
from optmerge_core.study.open import open_study
from optmerge_core.study.recipe import load_recipe

MERGES = [method for method in TABLE_METHODS if not method.startswith("dare")]


def weights_of(folder, names):
    """A specialist's language model: name -> float32 weight of the layers that merge."""
    own = open_specialist(folder).language_model
    return {n: own[n].float() for n in names}


def evaluate(study, specialists, decoupled, validation, test):
    """Test accuracies: specialists on their own, every merge, both online compositions.

    specialists, decoupled: modality -> adapter folder; validation, test: lists of questions.
    """
    opened = open_study(study, experts=specialists)
    names = opened.names
    start = {n: opened.base[n].float() for n in names}
    own = {m: {n: expert[n].float() for n in names} for m, expert in opened.experts.items()}
    merged = {m: opened.merge_tensors(m) for m in MERGES}

    def scaled(method, scaling):
        return {n: start[n] + scaling * merged[method][n] for n in names}

    rows = {}
    with TemporaryDirectory() as folder:
        compose(study.base_model, specialists, Path(folder, "omni"), method="weight_average")
        search = OmniEvaluator(Path(folder, "omni"), validation)
        scaling = best_scaling(
            search_scaling(
                lambda m, c: accuracies(search.answer(scaled(m, c)))["Avg"],
                MERGES,
                study.scaling_coefficients,
            )
        )
        for m, weights in own.items():
            alone = OmniEvaluator(Path(folder, "omni"), test, [m])
            rows[m] = accuracies(alone.answer(weights))
        evaluator = OmniEvaluator(Path(folder, "omni"), test)
        rows["base_model"] = accuracies(evaluator.answer(start))
        rows |= {m: accuracies(evaluator.answer(scaled(m, scaling[m]))) for m in MERGES}
        route(evaluator.model, online_weights(own))
        rows["naive_mc"] = accuracies(evaluator.answer())
        if decoupled:
            compose(study.base_model, decoupled, Path(folder, "damc"), method="weight_average")
            evaluator = OmniEvaluator(Path(folder, "damc"), test)
            features = {m: weights_of(path, names) for m, path in decoupled.items()}
            text = {m: weights_of(Path(path, TEXT), names) for m, path in decoupled.items()}
            route(evaluator.model, online_weights(features, text))
            rows["damc"] = accuracies(evaluator.answer())
    return pd.DataFrame(rows).T.rename_axis("model")


def main(recipe, output, seeds=SEEDS):
    study, tables = load_recipe(recipe), {}
    counts = {
        "validation": study.evaluation.validation_samples,
        "test": study.evaluation.test_samples,
    }
    questions = [draw_questions(split, count) for split, count in counts.items()]
    for seed in tqdm(seeds, desc="seeds"):
        specialists, decoupled = study.experts, study.evaluation.references
        if seed != SEEDS[0]:
            folder = Path(output, f"seed{seed}")
            specialists = {m: str(folder / m) for m in specialists}
            decoupled = {m: str(folder / "decoupled" / m) for m in decoupled}
        tables[seed] = evaluate(study, specialists, decoupled, *questions)
    write(tables, "seed", Path(output, "seeds.csv"))
