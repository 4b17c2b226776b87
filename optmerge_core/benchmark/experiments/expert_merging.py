"""What does a handful of unlabelled questions buy, and how near to mixture training does it come?

`python -m optmerge_core.benchmark expert-merging RECIPE OUT` draws questions of each task at random
(those of two samples are among those of five), learns coefficients on them without their answers
(Expert Merging), and lets OptMerge and Task Arithmetic choose λ on the same questions with their
answers. OUT/results.csv has a row for each seed, draw, number of samples and method: λ, loss before
and after, test accuracy a task; base, experts and mixture training stand beside them.
OUT/summary.csv has means over draws with 95 % intervals (Student's t). What is done is not done
again.
"""

from pathlib import Path

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from optmerge_core.benchmark.evaluator import evaluator_for
from optmerge_core.benchmark.experiments.seeds import trained
from optmerge_core.benchmark.training.build import SEEDS
from optmerge_core.checkpoints.open import open_expert
from optmerge_core.errors import extra
from optmerge_core.evaluation.expert_merging import Settings, learn
from optmerge_core.evaluation.metrics import accuracy
from optmerge_core.evaluation.questions import drawn, load_split, load_unlabelled, own_tasks
from optmerge_core.evaluation.selection import best_scaling, search_scaling
from optmerge_core.study.open import open_study
from optmerge_core.study.recipe import load_recipe

with extra("benchmark"):
    from datasets import concatenate_datasets
    from scipy import stats

SAMPLES, DRAWS = (1, 2, 5, 10), (0, 1, 2, 3, 4)
RIVALS = ("optmerge", "task_arithmetic")
KEYS = ["seed", "draw", "samples", "model"]
SETTINGS = {
    "Expert Merging": Settings(learning_rate=0.05, steps=60, initial=0.3, batch_size=64),
    "Expert Merging, by layer": Settings(
        learning_rate=0.05, steps=60, initial=0.3, batch_size=64, unit="layer"
    ),
}
"""Label -> how coefficients are learnt. The published 1e-4 moves no coefficient by more than 0.006
in 60 steps of Adam; with 0.05 they can go anywhere. These are not searched yet: choose them on
validation questions that no draw uses before a result is told."""


def labelled(study, count, draw):
    """The questions of `load_unlabelled`, with their answers."""
    parts = []
    for number, task in enumerate(study.experts):
        data = load_split(study.evaluation.data, "validation", tasks=[task])
        parts.append(data.select(drawn(len(data), count, draw, number)))
    return concatenate_datasets(parts)


def references(opened, test):
    """Model -> test answers of the base, the experts and the recipe's references."""
    places = opened.recipe.evaluation.references
    others = {name: open_expert(place, opened.base) for name, place in places.items()}
    answers = {"base_model": test.answer()}
    for name, model in (opened.experts | others).items():
        answers[name] = test.answer(model, opened.names)
    return answers


class Study:
    """One seed's experts: what every draw shares is computed once."""

    def __init__(self, study, folder):
        self.study, self.opened = study, open_study(study)
        size, folder = study.evaluation, Path(folder)
        self.base, self.tested = self.opened.base, {}
        self.test = evaluator_for(
            study.base_model, load_split(size.data, "test", size.test_samples)
        )
        self.rivals = {method: self.opened.merge_tensors(method) for method in RIVALS}
        done = folder / "references.csv"
        if not done.exists():
            rows = {model: accuracy(a) for model, a in references(self.opened, self.test).items()}
            folder.mkdir(parents=True, exist_ok=True)
            pd.DataFrame(rows).T.rename_axis("model").to_csv(done)

    def results(self, draw, count):
        """A row for each way to use `count` questions a task of a draw, and the coefficients."""
        rows, found, folder = [], {}, Path(self.study.evaluation.data, "validation")
        questions = load_unlabelled(folder, list(self.study.experts), count, draw)
        evaluator = self.test.asking(questions)
        for label, settings in SETTINGS.items():
            learnt = learn(self.opened, evaluator, settings)
            found[label] = learnt.coefficients
            scores = accuracy(self.test.answer_merged(self.base, learnt.merged(self.opened), 1.0))
            losses = {"loss_before": learnt.losses[0], "loss_after": learnt.losses[-1]}
            rows.append({"model": label} | losses | scores.to_dict())
        chosen = self._chosen(self.test.asking(labelled(self.study, count, draw)))
        for method, scaling in chosen.items():
            row = {"model": method, "scaling_coefficient": scaling}
            rows.append(row | self._tested(method, scaling).to_dict())
        table = pd.DataFrame(rows).assign(draw=draw, samples=count)
        return table, pd.concat(found, names=["model", "expert"])

    def _chosen(self, evaluator):
        """Method -> λ with the best accuracy on an evaluator's labelled questions."""

        def score(method, scaling):
            answers = evaluator.answer_merged(self.base, self.rivals[method], scaling)
            return accuracy(answers)["Avg"]

        return best_scaling(search_scaling(score, RIVALS, self.study.scaling_coefficients))

    def _tested(self, method, scaling):
        if (method, scaling) not in self.tested:
            answers = self.test.answer_merged(self.base, self.rivals[method], scaling)
            self.tested[method, scaling] = accuracy(answers)
        return self.tested[method, scaling]


def summary(results, study):
    """Means over draws and seeds, half-widths of their 95 % intervals, and what a sample buys.

    A row for each model and number of samples: accuracy (Avg), interval, runs; closed is the share
    in per cent of the way from OptMerge (λ on the most labelled questions) to mixture training.
    Experts have one row, each on its own tasks.
    """
    results = results.copy()
    own = {name: results.loc[results["model"] == name, t] for name, t in own_tasks(study).items()}
    experts = pd.concat([table.mean(axis=1) for table in own.values()])
    results = results[~results["model"].isin(own)]
    rows = [("experts", np.nan, experts.mean(), np.nan, results["seed"].nunique())]
    for (model, samples), group in results.groupby(["model", "samples"], dropna=False, sort=False):
        scores = group["Avg"]
        rows.append((model, samples, scores.mean(), half_width(scores), len(scores)))
    table = pd.DataFrame(rows, columns=["model", "samples", "accuracy", "interval", "runs"])
    best = table[table["model"] == "optmerge"].sort_values("samples")["accuracy"].iloc[-1]
    for name in study.evaluation.references:
        goal = table.loc[table["model"] == name, "accuracy"].item()
        table[f"closed, {name}"] = 100 * (table["accuracy"] - best) / (goal - best)
    return table


def half_width(scores):
    """Of the 95 % interval of a mean, by Student's t; NaN of one number."""
    if len(scores) < 2:
        return np.nan
    return stats.t.ppf(0.975, len(scores) - 1) * scores.std(ddof=1) / len(scores) ** 0.5


def main(recipe, output, samples=SAMPLES, draws=DRAWS, seeds=SEEDS[:1]):
    study, tables = load_recipe(recipe), []
    for seed in seeds:
        folder, opened = Path(output, f"seed{seed}"), None
        pairs = [(draw, count) for draw in draws for count in samples]
        for draw, count in tqdm(pairs, desc=f"seed {seed}"):
            done = folder / f"draw{draw}_samples{count}.csv"
            if not done.exists():
                opened = opened or Study(trained(study, folder, seed, references=True), folder)
                table, coefficients = opened.results(draw, count)
                coefficients.to_csv(folder / f"draw{draw}_samples{count}_coefficients.csv")
                table.to_csv(done, index=False)
            tables.append(pd.read_csv(done).assign(seed=seed))
        tables.append(pd.read_csv(folder / "references.csv").assign(seed=seed))
        results = pd.concat(tables, ignore_index=True)
        others = [name for name in results if name not in KEYS]
        results[[*KEYS, *others]].round(4).to_csv(Path(output, "results.csv"), index=False)
        summary(results, study).round(3).to_csv(Path(output, "summary.csv"), index=False)
