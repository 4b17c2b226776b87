"""Which sets of experts merge? Every pair, triple and all of them, merged with nothing chosen.

`python -m optmerge_core.benchmark subsets RECIPE... --output OUT` writes OUT/subsets.csv (a quarter
of an hour on two cores for the shipped recipes): validation accuracy of base, experts and merged
models on the tasks of the experts in the set. Notebook 01 sets it beside what `inspect` measures.
"""

import json
from itertools import combinations
from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm

from optmerge_core.benchmark.evaluator import evaluator_for
from optmerge_core.benchmark.tasks.samples import TASKS
from optmerge_core.evaluation.metrics import accuracy
from optmerge_core.evaluation.questions import load_split
from optmerge_core.study.open import open_study
from optmerge_core.study.recipe import load_recipe

MERGES = {  # column -> method, scaling coefficient (None: the recipe's)
    "task_arithmetic": ("task_arithmetic", 1.0),
    "task_arithmetic, half": ("task_arithmetic", 0.5),
    "optmerge": ("optmerge", None),
    "swudi": ("swudi", 1.0),
}


def trained_tasks(name, location):
    """The tasks an expert was trained on: what it is called, or what its log says."""
    log = Path(f"{location}.json")
    return [name] if name in TASKS else json.loads(log.read_text())["tasks"]


def score_sets(study, count=300):
    """A row per set of two, three and all experts of a recipe, accuracies in per cent.

    Columns: study, experts (names joined by +), base_model, own (each expert on its own tasks,
    averaged) and those of `MERGES`, averaged over the same tasks.
    """
    opened = open_study(study)
    base, names, experts = opened.base, opened.names, opened.experts
    tasks = {name: trained_tasks(name, folder) for name, folder in study.experts.items()}
    questions = {t: load_split(study.evaluation.data, "validation", count, [t]) for t in TASKS}
    evaluators = {t: evaluator_for(study.base_model, data) for t, data in questions.items()}

    def mean(answer, own):
        return sum(accuracy(answer(evaluators[t]), [t])[t] for t in own) / len(own)

    start = {task: mean(lambda e: e.answer(), [task]) for task in TASKS}
    alone = {
        name: mean(lambda e, x=expert: e.answer({n: x[n] for n in names}), tasks[name])
        for name, expert in experts.items()
    }
    sizes = sorted({2, min(3, len(experts)), len(experts)})
    sets = [chosen for size in sizes for chosen in combinations(experts, size)]
    rows = []
    for chosen in tqdm(sets, desc=study.name):
        own = [task for name in chosen for task in tasks[name]]
        row = {"study": study.name, "experts": "+".join(chosen)}
        row["base_model"] = sum(start[task] for task in own) / len(own)
        row["own"] = sum(alone[name] for name in chosen) / len(chosen)
        some = {name: experts[name] for name in chosen}
        for column, (method, scaling) in MERGES.items():
            scaling = study.scaling_coefficient if scaling is None else scaling
            merged = opened.merge_tensors(method, experts=some)
            row[column] = mean(lambda e, v=merged, c=scaling: e.answer_merged(base, v, c), own)
        rows.append(row)
    return pd.DataFrame(rows)


def main(recipes, output):
    Path(output).mkdir(parents=True, exist_ok=True)
    table = pd.concat([score_sets(load_recipe(path)) for path in recipes])
    table.round(4).to_csv(Path(output, "subsets.csv"), index=False)
