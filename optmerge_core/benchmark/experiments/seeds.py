"""The merging study for experts of other training seeds: how far do the results scatter?

`python -m optmerge_core.benchmark seeds RECIPE OUT` trains the recipe's experts anew for every seed
but the shipped one (about ten minutes each on two cores), merges and evaluates them as notebook 05
does, and writes OUT/seeds.csv: one row per seed and model, accuracy per task on test data.
"""

import shutil
from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm

from optmerge_core.benchmark.evaluator import evaluator_for
from optmerge_core.benchmark.experiments.variants import ablation, beyond
from optmerge_core.benchmark.training.build import SEEDS, build
from optmerge_core.checkpoints.open import open_checkpoint, open_expert
from optmerge_core.evaluation.metrics import accuracy
from optmerge_core.evaluation.questions import load_split
from optmerge_core.evaluation.selection import best_scaling, search_scaling
from optmerge_core.methods.registry import METHODS
from optmerge_core.study.open import open_study
from optmerge_core.study.recipe import load_recipe


def expert_folders(study, folder, seed):
    """Name -> folder of the study's experts for a seed; trained into `folder` unless shipped."""
    if seed == SEEDS[0]:
        return study.experts
    family = open_checkpoint(study.base_model).config()["model_type"]
    shutil.copytree(study.base_model, Path(folder, "base"), dirs_exist_ok=True)
    names = {name: "/".join(Path(location).parts[-2:]) for name, location in study.experts.items()}
    for name in names.values():
        build(folder, family, only=name, seed=seed)
    return {name: str(Path(folder, path)) for name, path in names.items()}


def evaluators(study):
    """For the recipe's validation and test questions."""
    size = study.evaluation
    counts = {"validation": size.validation_samples, "test": size.test_samples}
    return (
        evaluator_for(study.base_model, load_split(size.data, split, count))
        for split, count in counts.items()
    )


def evaluate(study, experts, validation, test):
    """Test accuracy of the experts, every method and variant, scaled by validation data.

    The variants are Table 4's steps and those of `variants.beyond`. The recipe's references
    (mixture training) and the base model do not depend on the seed, but stand in every seed's rows.
    """
    opened = open_study(study, experts=experts)
    base, names = opened.base, opened.names
    variants = {method: (method, study.options(method)) for method in METHODS}
    variants |= {step: v for step, v in ablation(study).items() if step.startswith("+")} | beyond()
    merged = {
        label: opened.merge_tensors(method, method_options=options)
        for label, (method, options) in variants.items()
    }

    def score(method, scaling):
        return accuracy(validation.answer_merged(base, merged[method], scaling))["Avg"]

    scaling = best_scaling(search_scaling(score, variants, study.scaling_coefficients))
    others = {n: open_expert(folder, base) for n, folder in study.evaluation.references.items()}
    rows = {"base_model": accuracy(test.answer())}
    for name, model in (opened.experts | others).items():
        rows[name] = accuracy(test.answer({n: model[n] for n in names}))
    rows |= {m: accuracy(test.answer_merged(base, merged[m], scaling[m])) for m in variants}
    return pd.DataFrame(rows).T.rename_axis("model")


def write(tables, level, path):
    """Tables by seed or rank (the name of that level) as one CSV of four decimals."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    pd.concat(tables, names=[level]).round(4).to_csv(path)


def main(recipe, output, seeds=SEEDS):
    study, tables = load_recipe(recipe), {}
    validation, test = evaluators(study)
    for seed in tqdm(seeds, desc="seeds"):
        experts = expert_folders(study, Path(output, f"seed{seed}"), seed)
        tables[seed] = evaluate(study, experts, validation, test)
    write(tables, "seed", Path(output, "seeds.csv"))
