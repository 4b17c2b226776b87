"""What the sliders of the notebooks show, stored: accuracy, norm and spectrum of many merges.

`python -m optmerge_core.benchmark play RECIPE... --output OUT` writes OUT/play_scores.csv (accuracy
on the first validation questions of each task, in per cent, for every merge and λ) and
OUT/play_spectra.csv (of every merge at λ = 1; norms and singular values are linear in λ).
A recipe takes about a minute; merges that OUT has already are not computed again, so another recipe
can be added. `benchmark/play.py` draws them.
"""

from pathlib import Path

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from optmerge_core.benchmark.evaluator import evaluator_for
from optmerge_core.benchmark.tasks.samples import TASKS
from optmerge_core.evaluation.metrics import accuracy
from optmerge_core.evaluation.questions import load_split
from optmerge_core.methods import TABLE_METHODS
from optmerge_core.methods.svd import singular_values
from optmerge_core.study.open import open_study
from optmerge_core.study.recipe import load_recipe

METHODS = [m for m in TABLE_METHODS if "dare" not in m and m != "aswudi"]
SCALING = (0.0, 0.3, 0.5, 0.7, 1.0, 1.5)
FEW = (0.0, 0.5, 1.0)
"""λ where an expert is left out or another rank kept."""
LEFT_OUT_BY = ("task_arithmetic", "optmerge")
RANK_RATIOS = (0.05, 0.4, 1.0)
"""Of OptMerge, beside its own 1/N."""
COUNT = 50
"""Questions a task: an answer is 2 points of a task, 0.4 of the average."""
SHARES = np.linspace(0.02, 1, 25)
"""Of the full rank: where a spectrum is read."""
MERGE = ["study", "method", "left_out", "rank_ratio"]
"""What names a merge; left_out and rank_ratio are empty where all experts and the recipe's are."""


def merges(experts):
    """All (method, expert left out or "", rank ratio or "") of the grid."""
    return (
        [(method, "", "") for method in METHODS]
        + [(method, expert, "") for method in LEFT_OUT_BY for expert in experts]
        + [("optmerge", "", ratio) for ratio in RANK_RATIOS]
    )


def merged_task_vector(opened, method, left_out="", rank_ratio=""):
    """Name -> merged task vector of an opened study by one of `merges`."""
    some = {name: expert for name, expert in opened.experts.items() if name != left_out}
    options = opened.recipe.options(method)
    options |= {} if rank_ratio == "" else {"rank_ratio": rank_ratio}
    return opened.merge_tensors(method, experts=some, method_options=options)


def evaluator_of(recipe, count=COUNT):
    """Asks the first `count` validation questions of each task."""
    data = load_split(recipe.evaluation.data, "validation", count)
    return evaluator_for(recipe.base_model, data)


def scores(evaluator, base, merged, scaling):
    """Accuracy per task and Avg, in per cent, of base + scaling · merged."""
    return accuracy(evaluator.answer_merged(base, merged, scaling), TASKS)


def spectrum(merged):
    """Norm of all, and the mean over its matrices of the singular values at `SHARES`: a dict."""
    square, curves = 0.0, []
    for tensor in merged.values():
        square += float(tensor.double().square().sum())
        if tensor.ndim == 2:
            values = singular_values(tensor).double().numpy()
            rank = np.arange(1, len(values) + 1) / len(values)
            curves.append(np.interp(SHARES, rank, values))
    columns = [f"{share:.4g}" for share in SHARES]
    return {"norm": square**0.5} | dict(zip(columns, np.mean(curves, axis=0), strict=True))


def grid_of(recipe, done, keep):
    """Compute what is not in `done` of a recipe; keep(key, scores, spectrum) after every merge.

    done: the keys, (study, method, left_out, rank_ratio), of merges finished before; scores: one
    row a λ. λ = 0 is the base model, whatever the merge.
    """
    opened, evaluator = open_study(recipe), evaluator_of(recipe)
    base_row = None
    for merge in tqdm(merges(opened.experts), desc=recipe.name):
        key = dict(zip(MERGE, (recipe.name, *merge), strict=True))
        if tuple(map(str, key.values())) in done:
            continue
        merged = merged_task_vector(opened, *merge)
        base_row = scores(evaluator, opened.base, merged, 0.0) if base_row is None else base_row
        rows = []
        for scaling in SCALING if merge[1:] == ("", "") else FEW:
            row = scores(evaluator, opened.base, merged, scaling) if scaling else base_row
            rows.append(key | {"scaling_coefficient": scaling} | dict(row))
        keep(rows, key | spectrum(merged))


def main(recipes, output):
    Path(output).mkdir(parents=True, exist_ok=True)
    paths = [Path(output, f"{name}.csv") for name in ("play_scores", "play_spectra")]
    kept = [read(path).to_dict("records") if path.is_file() else [] for path in paths]
    done = {tuple(str(row[name]) for name in MERGE) for row in kept[1]}

    def keep(rows, row):
        kept[0].extend(rows)
        kept[1].append(row)
        for path, table in zip(paths, kept, strict=True):
            pd.DataFrame(table).to_csv(path, index=False, float_format="%.4g")

    for path in recipes:
        grid_of(load_recipe(path), done, keep)


def read(path):
    """One of the two tables; a gap in left_out and rank_ratio is ""."""
    table = pd.read_csv(path, dtype={"left_out": str, "rank_ratio": str})
    return table.fillna({"left_out": "", "rank_ratio": ""})
