"""All methods on one study alike: λ from one search, length controlled, forgetting beside.

`python -m optmerge_core.benchmark comparison RECIPE OUT` merges the recipe's experts by every
method of `variants` for every seed (trained anew but for the shipped one, as `seeds` does it) and
writes OUT/comparison.csv: a row per seed and method with seconds, validation accuracy and the
number of λ tried, length of λ τm beside the sum of the task vectors and cosine with it, test
accuracy a task, that of the sum at the same length (control), and what it has `kept` of the base.
OUT/seeds.csv has the accuracies alone, OUT/search.csv the search for λ, OUT/answers.parquet every
answer to a test question; of smol's, those that need no eyes are asked with the picture blanked as
well (column `blanked`). A seed that is done is not done again.
"""

from pathlib import Path
from time import perf_counter

import pandas as pd
from tqdm.auto import tqdm

from optmerge_core.benchmark.experiments.kept import kept_by
from optmerge_core.benchmark.experiments.seeds import evaluators, scores, trained, write
from optmerge_core.benchmark.experiments.variants import ablation, beyond
from optmerge_core.benchmark.training.build import SEEDS
from optmerge_core.checkpoints.open import open_expert
from optmerge_core.evaluation.metrics import accuracy
from optmerge_core.evaluation.questions import blanked
from optmerge_core.evaluation.selection import best_scaling, search_scaling
from optmerge_core.methods import EXPERTS, FILES
from optmerge_core.study.open import open_study
from optmerge_core.study.recipe import load_recipe
from optmerge_core.task_vectors.stack import apply
from optmerge_core.task_vectors.tables import cosine, length

CALIBRATED = ("task_arithmetic", "tsv")


def variants(study, methods=None):
    """Label -> (method, options): all that merge any number of experts, some calibrated, `beyond`.

    The steps of Table 4 are among them. methods: labels to keep, in their order; `ValueError` for
    one that there is not.
    """
    found = {m: (m, study.options(m)) for m in FILES if m not in EXPERTS}
    found |= {f"{m}, SVC": (m, study.options(m) | {"then": "svc"}) for m in CALIBRATED}
    found |= {step: v for step, v in ablation(study).items() if step.startswith("+")} | beyond()
    if unknown := set(methods or ()) - found.keys():
        raise ValueError(f"no variant {', '.join(sorted(unknown))}; there are {', '.join(found)}")
    return {m: found[m] for m in methods} if methods else found


class Asked:
    """Test questions, and again with a blank picture those that need no eyes (column `blind`)."""

    def __init__(self, test):
        self.evaluators, data = {False: test}, test.questions
        if "blind" in data.column_names and any(data["blind"]):
            blind = [row for row, blind in enumerate(data["blind"]) if blind]
            self.evaluators[True] = test.asking(blanked(data.select(blind)))

    def __call__(self, weights=None):
        """task, prediction, correct and blanked of every question; weights: see `answer`."""
        weights = list(weights) if weights is not None else None
        found = [e.answer(weights).assign(blanked=b) for b, e in self.evaluators.items()]
        return pd.concat(found)[["task", "prediction", "correct", "blanked"]]


def seen(answers):
    """What `Asked` gives without the blanked questions."""
    return answers[~answers["blanked"]]


def rows_of(study, validation, test, kept, methods=None):
    """One seed: a row for each model of `variants`, the experts, references and base.

    kept: a function of weights, as `kept_by` gives it. Returns the columns of comparison.csv, the
    answers by model, and what `search_scaling` found.
    """
    opened, asked = open_study(study), Asked(test)
    base, names = opened.base, opened.names
    total = opened.merge_tensors("task_arithmetic")
    others = {n: open_expert(place, base) for n, place in study.evaluation.references.items()}
    rows, answers, searches = {"base_model": kept()}, {"base_model": asked()}, []

    def scaled(merged, scaling):
        return ((n, apply(base[n], merged[n], scaling)) for n in names)

    for name, model in tqdm((opened.experts | others).items(), desc="models"):
        own = {n: model[n] for n in names}
        rows[name], answers[name] = kept(own.items()), asked(own.items())
    for label, (method, options) in tqdm(variants(study, methods).items(), desc="methods"):
        begun = perf_counter()
        merged = opened.merge_tensors(method, method_options=options)
        row = {"seconds": perf_counter() - begun}

        def score(_, scaling, merged=merged):
            return accuracy(validation.answer_merged(base, merged, scaling))["Avg"]

        search = search_scaling(score, [label], study.scaling_coefficients)
        scaling = best_scaling(search)[label]
        share = scaling * length(merged) / length(total)
        answers[label] = asked(scaled(merged, scaling))
        row |= {"trials": len(search), "validation": search["accuracy"].max()}
        row |= {"scaling_coefficient": scaling, "length": share, "cosine": cosine(merged, total)}
        row["control"] = accuracy(test.answer_merged(base, total, share))["Avg"]
        rows[label] = row | kept(scaled(merged, scaling))
        searches.append(search)
    table = pd.DataFrame(rows).T.rename_axis("model")
    found = scores({model: seen(given) for model, given in answers.items()})
    return table.join(found), answers, pd.concat(searches)


def main(recipe, output, seeds=SEEDS, methods=None):
    study, tables, answers, searches = load_recipe(recipe), {}, {}, {}
    validation, test = evaluators(study)
    kept = kept_by(study, validation)
    for seed in tqdm(seeds, desc="seeds"):
        folder = Path(output, f"seed{seed}")
        if not (folder / "answers.parquet").exists():
            models = trained(study, folder, seed)
            table, said, search = rows_of(models, validation, test, kept, methods)
            folder.mkdir(parents=True, exist_ok=True)
            table.to_csv(folder / "comparison.csv")
            search.to_csv(folder / "search.csv", index=False)
            pd.concat(said, names=["model"]).to_parquet(folder / "answers.parquet")
        tables[seed] = pd.read_csv(folder / "comparison.csv", index_col="model")
        searches[seed] = pd.read_csv(folder / "search.csv", index_col="method")
        answers[seed] = pd.read_parquet(folder / "answers.parquet")
    table = pd.concat(tables, names=["seed"])
    columns = [*answers[seed]["task"].unique(), "Avg"]
    write({s: t[columns] for s, t in tables.items()}, "seed", Path(output, "seeds.csv"))
    write(searches, "seed", Path(output, "search.csv"))
    table.to_csv(Path(output, "comparison.csv"), float_format="%.6g")
    pd.concat(answers, names=["seed"]).to_parquet(Path(output, "answers.parquet"))
