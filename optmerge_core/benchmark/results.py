"""One study's tables, as notebooks 03 to 05 wrote them, and how its order of methods compares.

Nothing is computed from models here. Intervals are 95 % ones over the questions, of
`verdicts.bootstrap`.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from optmerge_core.benchmark.beside import BASE, MERGES, OPTMERGE
from optmerge_core.benchmark.shipped import shipped_scores
from optmerge_core.evaluation.verdicts import Scores, interval
from optmerge_core.figures import LABELS
from optmerge_core.study.report_text import SCORES

TRAINED = {"full": "full fine-tuning", "lora": "LoRA"}


@dataclass(frozen=True)
class Results:
    """The tables of one study: recipe, and the folder that the notebooks wrote for it."""

    recipe: object
    folder: Path

    def table(self, stem):
        """<stem>.csv of the folder, its first column as the index."""
        return pd.read_csv(Path(self.folder, f"{stem}.csv"), index_col=0)

    @property
    def name(self):
        return self.recipe.name

    @property
    def label(self):
        """Its name and how its experts were trained."""
        return f"{self.name} ({TRAINED[self.recipe.fine_tuning]})"

    @cached_property
    def stem(self):
        """The name of its table of scores."""
        there = [stem for stem in SCORES if Path(self.folder, f"{stem}.csv").is_file()]
        if not there:
            raise ValueError(f"{self.folder} has no table of scores: run notebook 04 or 05 first")
        return there[0]

    @cached_property
    def scores(self):
        """Test accuracy, model × task."""
        return self.table(self.stem)

    @cached_property
    def by_seed(self):
        """Average of every model by training seed (seed × model), None if there are no others."""
        seeds = shipped_scores(self.recipe)
        if seeds is None:
            return None
        return seeds["Avg"].unstack("model").rename(columns=LABELS)

    @property
    def seeds(self):
        return 1 if self.by_seed is None else len(self.by_seed)

    @cached_property
    def compared(self):
        """The single answers, see `Scores`."""
        answers = pd.read_parquet(Path(self.folder, "predictions.parquet"))
        return Scores({name: rows for name, rows in answers.groupby("model", sort=False)})

    @property
    def questions(self):
        """Test questions that each model was asked."""
        answers = pd.read_parquet(Path(self.folder, "predictions.parquet"), columns=["model"])
        return int(answers.value_counts().max())

    def own(self, scores):
        """The mean of the experts' accuracies, each on its own task: model -> row by task."""
        tasks = [c for c in self.scores if f"Individual {c}" in self.scores.index]
        return np.mean([scores[f"Individual {task}"][task] for task in tasks], axis=0)

    def covered(self, model=OPTMERGE):
        """Per cent of the way from the base to the experts' own level: (share, low, high)."""

        def share(scores):
            base, own = scores[BASE]["Avg"], self.own(scores)
            return 100 * (scores[model]["Avg"] - base) / (own - base)

        return share(self.compared.run), *interval(share(self.compared.samples))


def spearman(first, second):
    """Rank correlation of two series over the labels that both have, ties sharing their rank."""
    both = pd.DataFrame({"first": first, "second": second}).dropna().rank()
    return both["first"].corr(both["second"])


def by_chance(methods, share=0.95, draws=10000):
    """What |ρ| of so many methods in random order stays below, in that share of the draws."""
    rng = np.random.default_rng(0)
    ranks = rng.permuted(np.tile(np.arange(methods), (draws, 1)), axis=1)
    return np.quantile(abs(np.corrcoef(np.arange(methods), ranks)[0, 1:]), share)


def order(paper, results):
    """Spearman's ρ of the paper's averages with a study's, over the methods of both.

    Returns a row: methods, |ρ| by chance, ρ, its interval over the questions and its ends over the
    seeds, missing where there are no single answers, or no other seeds.
    """
    names = [n for n in MERGES if n in paper.index and n in results.scores.index]
    row = {"methods": len(names), "by chance": by_chance(len(names))}
    row["ρ"] = spearman(paper[names], results.scores["Avg"][names])
    if Path(results.folder, "predictions.parquet").is_file():
        drawn = pd.DataFrame({n: results.compared.samples[n]["Avg"] for n in names})
        every = drawn.T.apply(lambda scores: spearman(paper[names], scores))
        row["low"], row["high"] = interval(every)
    if results.by_seed is not None:
        every = results.by_seed[names].apply(lambda scores: spearman(paper[names], scores), axis=1)
        row["lowest seed"], row["highest seed"] = every.min(), every.max()
    return row
