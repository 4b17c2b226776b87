"""The merging study for experts of other training seeds: how far do the results scatter?

`python -m optmerge_core.benchmark seeds RECIPE OUT` trains the recipe's experts anew for every seed
but the shipped one (about ten minutes each on two cores; smol's twenty), merges and evaluates them
as notebook 05 does, and writes OUT/seeds.csv: one row per seed and model, accuracy per task on test
data. OUT/answers.parquet has the answers themselves, OUT/search.csv what the search for scaling
coefficients found on validation data. A seed that is done is not done again. With `--regime` the
experts are those of another of the family's regimes.
"""

import shutil
from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm

from optmerge_core.benchmark.evaluator import evaluator_for
from optmerge_core.benchmark.experiments.variants import ablation, beyond
from optmerge_core.benchmark.training.build import REGIMES, SEEDS, build
from optmerge_core.checkpoints.open import open_checkpoint, open_expert
from optmerge_core.evaluation.metrics import accuracy
from optmerge_core.evaluation.questions import load_split
from optmerge_core.evaluation.selection import best_scaling, search_scaling
from optmerge_core.methods import TABLE_METHODS
from optmerge_core.study.open import open_study
from optmerge_core.study.recipe import load_recipe


def trained(study, folder, seed, references=False, regime=None):
    """The study with the experts of a seed, trained into `folder` unless they are the shipped ones.

    references: whether its models of mixture training are trained anew as well; regime: another
    than the study's, a key of REGIMES.
    """
    if seed == SEEDS[0] and regime is None:
        return study
    anew = trainer(study, folder, regime, seed=seed)
    study = with_experts(study, {name: anew(place) for name, place in study.experts.items()})
    if not references:
        return study
    others = {name: anew(place) for name, place in study.evaluation.references.items()}
    evaluation = study.evaluation.model_copy(update={"references": others})
    return study.model_copy(update={"evaluation": evaluation})


def trainer(study, folder, regime=None, **settings):
    """A function from where a model of a shipped study is to where it is trained anew, in `folder`.

    regime: another than its own; settings: as `build` takes them.
    """
    base = Path(study.base_model).resolve()
    family = base.parent.name
    if family not in REGIMES:
        family = open_checkpoint(base).config()["model_type"]
    shutil.copytree(base, Path(folder, "base"), dirs_exist_ok=True)

    def anew(location):
        own, model = Path(location).parts[-2:]
        name = f"{regime or own}/{model}"
        build(folder, family, only=name, **settings)
        return str(Path(folder, name))

    return anew


def with_experts(study, experts):
    """The study with other experts: name -> location, the names those it has."""
    models = [e.model_copy(update={"model": experts[e.name]}) for e in study.models]
    return study.model_copy(update={"models": models})


def evaluators(study):
    """For the recipe's validation and test questions."""
    size = study.evaluation
    counts = {"validation": size.validation_samples, "test": size.test_samples}
    return (
        evaluator_for(study.base_model, load_split(size.data, split, count))
        for split, count in counts.items()
    )


def evaluate(study, validation, test):
    """Test answers of the experts, every method and variant, scaled by validation data, by model.

    The variants are Table 4's steps and those of `variants.beyond`. The recipe's references
    (mixture training) and the base model stand beside them. Returns the answers by model, and the
    table of `search_scaling`.
    """
    opened = open_study(study)
    base, names = opened.base, opened.names
    variants = {method: (method, study.options(method)) for method in TABLE_METHODS}
    variants |= {step: v for step, v in ablation(study).items() if step.startswith("+")} | beyond()
    merged = {
        label: opened.merge_tensors(method, method_options=options)
        for label, (method, options) in variants.items()
    }

    def score(method, scaling):
        return accuracy(validation.answer_merged(base, merged[method], scaling))["Avg"]

    search = search_scaling(score, variants, study.scaling_coefficients)
    scaling = best_scaling(search)
    others = {n: open_expert(folder, base) for n, folder in study.evaluation.references.items()}
    answers = {"base_model": test.answer()}
    for name, model in (opened.experts | others).items():
        answers[name] = test.answer({n: model[n] for n in names})
    for method in variants:
        answers[method] = test.answer_merged(base, merged[method], scaling[method])
    return answers, search


def scores(answers):
    """Accuracy per task and on average, a row for each model of `evaluate`."""
    rows = {model: accuracy(table) for model, table in answers.items()}
    return pd.DataFrame(rows).T.rename_axis("model")


def write(tables, level, path):
    """Tables by seed or rank (the name of that level) as one CSV of four decimals."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    pd.concat(tables, names=[level]).round(4).to_csv(path)


def main(recipe, output, seeds=SEEDS, references=False, regime=None):
    study, answers, searches = load_recipe(recipe), {}, {}
    validation, test = evaluators(study)
    for seed in tqdm(seeds, desc="seeds"):
        folder = Path(output, f"seed{seed}")
        done, tried = folder / "answers.parquet", folder / "search.csv"
        if not done.exists():
            models = trained(study, folder, seed, references, regime)
            found, search = evaluate(models, validation, test)
            columns = ["task", "prediction", "correct"]
            folder.mkdir(parents=True, exist_ok=True)
            search.to_csv(tried, index=False)
            pd.concat({m: a[columns] for m, a in found.items()}, names=["model"]).to_parquet(done)
        answers[seed], searches[seed] = pd.read_parquet(done), pd.read_csv(tried)
    by_model = {seed: dict(list(t.groupby("model", sort=False))) for seed, t in answers.items()}
    write({s: scores(found) for s, found in by_model.items()}, "seed", Path(output, "seeds.csv"))
    by_method = {seed: table.set_index("method") for seed, table in searches.items()}
    write(by_method, "seed", Path(output, "search.csv"))
    pd.concat(answers, names=["seed"]).to_parquet(Path(output, "answers.parquet"))
