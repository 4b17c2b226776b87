"""What the notebooks ask of a recipe, be it a shipped one or one of anybody's checkpoints."""

from pathlib import Path

import pandas as pd

from optmerge_core.benchmark.tasks import samples
from optmerge_core.checkpoints.formats import read_json

TOLD = ("internvl", "qwen2_vl", "omni")
"""The studies that the texts of notebooks 00 to 06 are about; 07 tells of smol."""


def is_shipped(study):
    """Whether the study's models and scores are the package's own."""
    return Path(study.base_model).resolve().parts[-4:-1] == ("data", "benchmark", study.name)


def is_told(study):
    """Whether what the notebooks' texts say is said of this study."""
    return is_shipped(study) and study.name in TOLD


def is_published(study):
    """Whether the paper's numbers belong beside this study's: a shipped one, or its own."""
    return is_shipped(study) or study.name.startswith("paper_table")


def check_claims(study, claims):
    """What a notebook's text says of the studies it tells of, printed claim by claim.

    study: one, or a list of those that the claims are about together. claims: claim -> whether it
    holds here, or that and the numbers compared, in words. Raises `AssertionError` after the last
    one if any does not hold and the texts are about the study, or one of several; of other studies
    it is only said.
    """
    told = any(map(is_told, study if isinstance(study, list) else [study]))
    found = {
        claim: held if isinstance(held, tuple) else (held, "") for claim, held in claims.items()
    }
    for claim, (holds, compared) in found.items():
        said = f"{'holds' if holds else 'does not hold'}: {claim}"
        print(f"{said} ({compared})" if compared else said)
    false = [claim for claim, (holds, _) in found.items() if not holds]
    assert not false or not told, "; ".join(false)


def validation_count(study):
    """Validation questions a task where λ is not searched: all of a small study's (None)."""
    return None if is_told(study) else study.evaluation.validation_samples


def sampler(study):
    """What draws a shipped study's samples: (task, split, index, …) -> sample."""
    if is_shipped(study) and study.name == "smol":
        from optmerge_core.benchmark.tasks.english import samples as english

        return english.sample
    return samples.sample


def training_log(location):
    """The log beside a checkpoint that the embedded benchmark trained; None where there is none."""
    path = Path(f"{location}.json")
    return read_json(path) if location and path.is_file() else None


def shipped_scores(study):
    """The table `seeds.csv` of a shipped study, by seed and model; None where there is none."""
    path = Path(study.base_model).parent / "seeds.csv"
    return pd.read_csv(path, index_col=["seed", "model"]) if is_shipped(study) else None
