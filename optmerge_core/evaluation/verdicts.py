"""Telling differences from chance: which of two models is ahead, or can it not be told?

Two kinds of chance are known here: which questions were drawn (a bootstrap, paired between models)
and how the experts' training fell out (other training seeds). A claim is believed where both agree.
"""

from dataclasses import asdict, dataclass, replace

import numpy as np
import pandas as pd

from optmerge_core.errors import extra
from optmerge_core.evaluation.metrics import accuracy

FAILS, UNDECIDED, UNTESTABLE, HOLDS = (
    "does not hold",
    "undecided",
    "not testable here",
    "holds",
)


def bootstrap(answers, resamples=1000, seed=0):
    """Resampled accuracies (resamples, tasks + 1), in per cent; the last column is the average.

    Pictures are drawn anew within each task, with all questions about them (column hash; without
    it questions). The same seed draws the same for every model, so differences between two models'
    results are paired.
    """
    rng = np.random.default_rng(seed)
    columns = []
    for _, rows in answers.groupby("task", sort=False):
        pictures = rows["hash"] if "hash" in rows else rows.index
        correct = rows["correct"].astype(float).groupby(pictures, sort=False)
        right, asked = correct.sum().to_numpy(), correct.size().to_numpy()
        draws = rng.integers(len(right), size=(resamples, len(right)))
        columns.append(100 * right[draws].sum(1) / asked[draws].sum(1))
    return np.column_stack([*columns, np.mean(columns, axis=0)])


def interval(samples, level=0.95):
    """The central interval of bootstrap samples, along the first axis."""
    return np.quantile(samples, [(1 - level) / 2, (1 + level) / 2], axis=0)


@dataclass(frozen=True)
class Verdict:
    """A claim's verdict and what it rests on: leads in points, positive where the claim holds."""

    lead: float
    low: float  # 95 % interval of the lead, over the questions
    high: float
    lowest_seed: float  # over the training seeds
    highest_seed: float
    verdict: str
    why: str  # what is in doubt, or not testable; of several comparisons, which one decided


def verdict(lead=np.nan, samples=None, seeds=(), untestable=""):
    """Does a claim hold? Decided by the signs of its lead, of the lead's interval and of its seeds.

    lead: this run's, in points, positive where the claim holds. samples: the same over resampled
    questions, paired, or None where no questions were asked (a measured cost), and the lead stands
    for itself. seeds: the lead of each training seed; without any the verdict is about this run.
    untestable: why this setting cannot show the thing, such as two models that are the same.

    *holds*: lead, both ends of the 95 % interval and every seed are above 0; *does not hold*: all
    of them are below 0; *not testable here*: `untestable` says why; *undecided*: anything else,
    that is a tie (the interval contains 0) or seeds that contradict each other or this run.
    """
    low, high = (np.nan, np.nan) if samples is None else interval(samples)
    seeds = np.asarray(seeds, float)
    ends = (seeds.min(), seeds.max()) if seeds.size else (np.nan, np.nan)
    if untestable:
        return Verdict(lead, low, high, *ends, UNTESTABLE, untestable)
    if np.isnan([lead, *seeds]).any():
        raise ValueError(f"lead {lead}, seeds {seeds}: without a number, say why (untestable=…)")
    run = {np.sign(value) for value in (lead, low, high) if not np.isnan(value)}
    signs = run | set(np.sign(seeds))
    if len(signs) == 1 and signs != {0}:
        return Verdict(lead, low, high, *ends, HOLDS if signs == {1} else FAILS, "")
    why = "the seeds do not agree" if len(run) == 1 and run != {0} else "the interval contains 0"
    return Verdict(lead, low, high, *ends, UNDECIDED, why)


def every(verdicts):
    """The verdict on "all of these hold" (label -> Verdict): the least favourable of them."""
    return _deciding(min, verdicts)


def some(verdicts):
    """The verdict on "one of these holds" (label -> Verdict): the most favourable of them."""
    return _deciding(max, verdicts)


def _deciding(choose, verdicts):
    order = (FAILS, UNDECIDED, UNTESTABLE, HOLDS)
    label, found = choose(
        verdicts.items(), key=lambda item: (order.index(item[1].verdict), item[1].lead)
    )
    return replace(found, why=": ".join(filter(None, (label, found.why))))


class Scores:
    """Test answers of several models to the same questions, to be compared two by two.

    answers: model -> its answers, one row a question (columns task, correct). seeds: accuracies of
    other training runs, by (seed, model), columns as of `accuracy`; None if there are none.
    """

    def __init__(self, answers, seeds=None):
        self.run = {model: accuracy(rows) for model, rows in answers.items()}
        self.samples = {
            model: pd.DataFrame(bootstrap(rows), columns=self.run[model].index)
            for model, rows in answers.items()
        }
        self.seeds = None if seeds is None else dict(list(seeds.groupby("model")))

    def beats(self, better, worse, column="Avg", untestable=""):
        """The verdict on "`better` is ahead of `worse`": models, or lists of them (their mean)."""

        def mean(table, models):
            models = [models] if isinstance(models, str) else models
            return np.mean([table[model][column] for model in models], axis=0)

        tables = [self.run, self.samples] + ([] if self.seeds is None else [self.seeds])
        return verdict(
            *(mean(table, better) - mean(table, worse) for table in tables), untestable=untestable
        )


def verdict_table(verdicts, name="claim"):
    """One row a verdict (label -> Verdict), one column for each of its parts."""
    rows = {label: asdict(found) for label, found in verdicts.items()}
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis(name)
    return table.rename(columns=lambda column: column.replace("_", " "))


def average_ranks(scores):
    """Mean rank of each model, 1 the best, equals sharing theirs: of a table, blocks × models."""
    return scores.rank(axis=1, ascending=False).mean().sort_values()


def critical_difference(models, blocks, level=0.95):
    """How far two of `models` average ranks must lie apart to differ, over `blocks` of scores.

    Nemenyi's test, as in Demšar, "Statistical comparisons of classifiers over multiple data sets"
    (2006): q √(k (k + 1) / 6 N), q the Studentized range's quantile, divided by √2. It takes the
    blocks for independent; those that share a study are not, so that it is too small for them.
    """
    with extra("benchmark"):
        from scipy.stats import studentized_range

    quantile = studentized_range.ppf(level, models, np.inf) / 2**0.5
    return float(quantile * (models * (models + 1) / (6 * blocks)) ** 0.5)


def sentences(verdicts):
    """One line for each kind of verdict that occurs, with the claims that it is said of."""
    lines = []
    for kind in (HOLDS, FAILS, UNDECIDED, UNTESTABLE):
        if labels := [label for label, found in verdicts.items() if found.verdict == kind]:
            lines.append(f"{kind[0].upper()}{kind[1:]}: {'; '.join(labels)}.")
    return "\n".join(lines)
