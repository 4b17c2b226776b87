"""The merging study for experts of other training seeds: how far do the results scatter?

`python -m optmerge_core.benchmark.seeds RECIPE OUT` trains the recipe's experts anew for every seed
but the shipped one (about ten minutes each on two cores), merges and evaluates them as notebook 05
does, and writes OUT/seeds.csv: one row per seed and model, accuracy per task on test data.
"""

import argparse
import shutil
from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm

from optmerge_core import METHODS, load_recipe, open_checkpoint, open_expert
from optmerge_core.merge import merge_tensors
from optmerge_core.parameters import mergeable

from .evaluation import Evaluator, accuracy, load_split
from .selection import best_scaling, search_scaling
from .training import build

SHIPPED, OTHERS = 1, (11, 21)


def expert_folders(study, folder, seed):
    """Name -> folder of the study's experts for a seed; trained into `folder` unless shipped."""
    if seed == SHIPPED:
        return study.experts
    shutil.copytree(study.base_model, Path(folder, "base"), dirs_exist_ok=True)
    names = {name: "/".join(Path(location).parts[-2:]) for name, location in study.experts.items()}
    for name in names.values():
        build(folder, only=name, seed=seed)
    return {name: str(Path(folder, path)) for name, path in names.items()}


def evaluate(study, experts):
    """Test accuracy of the experts and of every method, its scaling from validation data."""
    base, size = open_checkpoint(study.base_model), study.evaluation
    opened = {name: open_expert(folder, base) for name, folder in experts.items()}
    names = mergeable(base.shapes(), base.config()["model_type"])
    merged = {
        method: merge_tensors(
            base,
            opened,
            names,
            method=method,
            method_options=study.options(method),
            seed=study.seed,
        )
        for method in METHODS
    }
    validation, test = (
        Evaluator(study.base_model, load_split(size.data, split, count))
        for split, count in (
            ("validation", size.validation_samples),
            ("test", size.test_samples),
        )
    )

    def score(method, scaling):
        return accuracy(validation.merged(base, merged[method], scaling))["Avg"]

    scaling = best_scaling(search_scaling(score, METHODS, study.scaling_coefficients))
    rows = {n: accuracy(test.answer({p: e[p] for p in names})) for n, e in opened.items()}
    rows |= {m: accuracy(test.merged(base, merged[m], scaling[m])) for m in METHODS}
    return pd.DataFrame(rows).T.rename_axis("model")


def main(recipe, output, seeds):
    study, tables = load_recipe(recipe), {}
    for seed in tqdm(seeds, desc="seeds"):
        tables[seed] = evaluate(study, expert_folders(study, Path(output, f"seed{seed}"), seed))
    table = pd.concat(tables, names=["seed"]).round(4)
    Path(output).mkdir(parents=True, exist_ok=True)
    table.to_csv(Path(output, "seeds.csv"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("output")
    parser.add_argument("--seeds", nargs="+", type=int, default=[SHIPPED, *OTHERS])
    arguments = parser.parse_args()
    main(arguments.recipe, arguments.output, arguments.seeds)
