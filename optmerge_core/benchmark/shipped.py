"""What the notebooks ask of a recipe, be it a shipped one or one of anybody's checkpoints."""

from pathlib import Path

import pandas as pd

from optmerge_core.checkpoints.formats import read_json


def is_shipped(study):
    """Whether the study is one that the notebooks' texts and the shipped scores are about."""
    return Path(study.base_model).resolve().parts[-4:-1] == ("data", "benchmark", study.name)


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
