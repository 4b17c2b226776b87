"""What the notebooks ask of a recipe, be it a shipped one or one of anybody's checkpoints."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import pandas as pd
import psutil

from optmerge_core.checkpoints import read_json
from optmerge_core.checks import check_experts, tied_head
from optmerge_core.parameters import mergeable

from .evaluation import tasks_of

SHIPPED = Path(__file__).resolve().parents[2] / "data" / "benchmark"


def is_shipped(study):
    """Whether the study is one that the notebooks' texts and the shipped scores are about."""
    return Path(study.base_model).resolve().parent == SHIPPED / study.name


def is_published(study):
    """Whether the paper's numbers belong beside this study's: a shipped one, or its own."""
    return is_shipped(study) or study.name.startswith("paper_table")


def check_claims(study, claims):
    """What a notebook's text says of the shipped studies (claim -> whether it holds here).

    Silent where it holds for them, `AssertionError` where it does not; of another study it is
    printed, since the text was not written about that.
    """
    if is_shipped(study):
        false = [claim for claim, holds in claims.items() if not holds]
        assert not false, "; ".join(false)
        return
    for claim, holds in claims.items():
        print(f"{'holds' if holds else 'does not hold'} here: {claim}")


def names_to_merge(study, base, experts, scope=None):
    """The parameters that `merge` merges by the recipe's scope (or another), in the files' order.

    base, experts: opened checkpoints. Raises `ValueError` for experts that are none of this base.
    """
    model_type, scope = study.family or base.config().get("model_type"), scope or study.scope
    tied = tied_head(base) if scope == "all" else {}
    names = [name for name in mergeable(base.shapes(), model_type, scope) if name not in tied]
    return check_experts(base, experts, names, model_type)


def inner(first, second):
    """The inner product of two merged task vectors (name -> tensor), as of two flat vectors."""
    return sum(float((first[n].double() * second[n].double()).sum()) for n in first)


def cosine(first, second):
    """The cosine of two merged task vectors."""
    return inner(first, second) / (inner(first, first) * inner(second, second)) ** 0.5


def own_tasks(study):
    """Expert -> the tasks that it is asked as its own: the one of its name, or else all."""
    tasks = tasks_of(study.evaluation.data)
    return {name: [name] if name in tasks else tasks for name in study.experts}


def validation_count(study):
    """Validation questions a task where λ is not searched: all of a shipped study's (None)."""
    return None if is_shipped(study) else study.evaluation.validation_samples


def training_log(location):
    """The log beside a checkpoint that the embedded benchmark trained; None where there is none."""
    path = Path(f"{location}.json")
    return read_json(path) if location and path.is_file() else None


def shipped_scores(study):
    """The table `seeds.csv` of a shipped study, by seed and model; None where there is none."""
    path = Path(study.base_model).parent / "seeds.csv"
    return pd.read_csv(path, index_col=["seed", "model"]) if is_shipped(study) else None


class MergedTaskVectors(Mapping):
    """Variant -> merged task vector (name -> tensor), computed when it is asked for.

    merge: variant -> merged task vector; variants: their names, to which others may be added.
    Results are kept while all of them take less than `share` of the memory that was free; beyond
    that the oldest goes, and is computed again when it is asked for. A merged task vector takes 4
    bytes a parameter: 28 GB for 7B parameters.
    """

    def __init__(self, merge, variants, share=0.4):
        self.merge, self.variants = merge, variants
        self.limit = share * psutil.virtual_memory().available
        self.kept = {}

    def __getitem__(self, variant):
        if variant not in self.variants:
            raise KeyError(variant)
        if variant not in self.kept:
            size = sum(self._bytes(kept) for kept in self.kept.values())
            while self.kept and size + self._bytes(next(reversed(self.kept.values()))) > self.limit:
                size -= self._bytes(self.kept.pop(next(iter(self.kept))))
            self.kept[variant] = self.merge(variant)
        return self.kept[variant]

    def __iter__(self) -> Iterator[str]:
        return iter(self.variants)

    def __len__(self):
        return len(self.variants)

    @staticmethod
    def _bytes(merged):
        return sum(tensor.nbytes for tensor in merged.values())
