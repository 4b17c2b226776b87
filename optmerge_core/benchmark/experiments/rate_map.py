"""How much of a lead is the learning rate? Merging's own, against λ, for methods that descend.

`python -m optmerge_core.benchmark rate-map RECIPE OUT` merges the recipe's experts by WUDI and
OptMerge at every learning rate of RATES, at the published one and in the limit of many steps, and
scores all of them at every scaling coefficient on validation questions: OUT/rate_map.csv. Then rate
and λ are chosen together, and for every other method λ from the same grid; OUT/tuned.csv has a row
per seed and method: what was tried and chosen, and accuracy on test questions, beside that at the
recipe's own rate. Experts of other seeds are trained, as `seeds` does it.
"""

from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm

from optmerge_core.benchmark.experiments.seeds import evaluators, trained
from optmerge_core.benchmark.training.build import SEEDS
from optmerge_core.evaluation.metrics import accuracy
from optmerge_core.methods import TABLE_METHODS
from optmerge_core.methods.optmerge import PRESETS
from optmerge_core.study.open import open_study
from optmerge_core.study.recipe import load_recipe
from optmerge_core.task_vectors.tables import length

DESCENDING = ("wudi", "optmerge")
RATES = {
    "adam": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    "sgd": (1e-3, 1e-2, 5e-2, 2e-1, 5e-1),
}
"""Optimizer -> learning rates: Adam's in units of the task vectors' root mean square; SGD's, whose
steps follow the task vectors' size by themselves, as they are."""
LIMIT = {"optimizer": "ridge", "shrink": 1e-6}
SCALINGS = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0)


def ways(study, method, rms):
    """What is tried of a method: (which, learning rate in RATES' units, options), one a row.

    which: "recipe", and of DESCENDING "published", "grid" and "limit", whose learning rate is
    infinite; others have none (NaN). rms: of all entries of the task vectors that merge.
    """
    own = study.options(method)
    if method not in DESCENDING:
        return [("recipe", float("nan"), own)]
    preset = PRESETS[own.get("preset", "full")]  # WUDI's defaults are full's
    optimizer, rate = own.get("optimizer", preset.optimizer), preset.learning_rate
    scale = rms if optimizer == "adam" else 1.0
    given = own.get("learning_rate", rate)
    rest = {k: v for k, v in own.items() if not k.startswith("learning_rate")}
    unit = {"learning_rate_unit": "rms"} if optimizer == "adam" else {}
    return [
        ("recipe", given / (1 if own.get("learning_rate_unit") == "rms" else scale), own),
        ("published", rate / scale, rest | {"learning_rate": rate}),
        *(("grid", r, rest | unit | {"learning_rate": r}) for r in RATES[optimizer]),
        ("limit", float("inf"), {k: v for k, v in rest.items() if k != "optimizer"} | LIMIT),
    ]


def root_mean_square(task_vectors):
    """Of all entries of name -> (experts, *shape)."""
    squares, entries = 0.0, 0
    for stack in task_vectors.values():
        squares += stack.double().square().sum().item()
        entries += stack.numel()
    return (squares / entries) ** 0.5


def search(study, opened, validation, methods=TABLE_METHODS):
    """Validation accuracy of every method, learning rate and scaling coefficient: a tidy table.

    Columns: method, which and learning_rate as of `ways`, norm (of the merged task vector, in those
    of the experts' sum), scaling_coefficient, accuracy.
    """
    rms, rows = root_mean_square(opened.task_vectors()), []
    whole = length(opened.merge_tensors("task_arithmetic"))
    for method in tqdm(methods, desc="methods", leave=False):
        for which, rate, options in tqdm(ways(study, method, rms), desc=method, leave=False):
            merged = opened.merge_tensors(method, method_options=options)
            row = {"method": method, "which": which, "learning_rate": rate}
            row |= {"norm": length(merged) / whole}
            for scaling in SCALINGS:
                answers = validation.answer_merged(opened.base, merged, scaling)
                score = {"scaling_coefficient": scaling, "accuracy": accuracy(answers)["Avg"]}
                rows.append(row | score)
    return pd.DataFrame(rows)


def chosen(table):
    """Method -> the row of the best validation accuracy; of equals the smallest rate and λ."""
    order = ["accuracy", "learning_rate", "scaling_coefficient"]
    ordered = table.sort_values(order, ascending=[False, True, True])
    return ordered.drop_duplicates("method").set_index("method")


def tested(study, opened, table, test):
    """Test accuracy of every method as chosen with its learning rate, and at the recipe's own.

    Columns beside `chosen`'s: trials; test; and recipe_scaling and recipe_test, where the rate is
    the recipe's and λ alone is chosen.
    """
    rms, rows = root_mean_square(opened.task_vectors()), []
    tuned, plain = chosen(table), chosen(table[table["which"] == "recipe"])

    def score(method, row):
        options = next(
            o for which, rate, o in ways(study, method, rms)
            if which == row["which"] and (rate == row["learning_rate"] or which != "grid")
        )  # fmt: skip
        merged = opened.merge_tensors(method, method_options=options)
        answers = test.answer_merged(opened.base, merged, row["scaling_coefficient"])
        return accuracy(answers)["Avg"]

    for method, row in tqdm(tuned.iterrows(), total=len(tuned), desc="test", leave=False):
        own = plain.loc[method]
        rows.append(
            {"method": method, **row, "trials": int((table["method"] == method).sum())}
            | {"test": score(method, row)}
            | {"recipe_scaling": own["scaling_coefficient"], "recipe_test": score(method, own)}
        )
    return pd.DataFrame(rows)


def main(recipe, output, seeds=SEEDS):
    study, maps, results = load_recipe(recipe), {}, {}
    validation, test = evaluators(study)
    for seed in tqdm(seeds, desc="seeds"):
        folder = Path(output, f"seed{seed}")
        done = folder / "map.csv", folder / "tuned.csv"
        if not done[1].exists():
            models = trained(study, folder, seed)
            opened = open_study(models)
            folder.mkdir(parents=True, exist_ok=True)
            table = search(models, opened, validation)
            table.to_csv(done[0], index=False)
            tested(models, opened, table, test).to_csv(done[1], index=False)
        maps[seed], results[seed] = map(pd.read_csv, done)
    for name, tables in {"rate_map": maps, "tuned": results}.items():
        table = pd.concat(tables, names=["seed"]).reset_index("seed")
        table.to_csv(Path(output, f"{name}.csv"), index=False, float_format="%.6g")
