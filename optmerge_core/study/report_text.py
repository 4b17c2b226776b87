"""What a run's page says in words: the finding, from the tables, and a sentence for each figure."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path

SCORES = ("table02_full_finetuning", "table03_lora", "table05_modalities")
"""Tables of models on test questions, with a column Avg; a study has one of them."""
CLAIMS = "tablexx_claims"

SENTENCES = {
    "fig01_overview": "The idea, and two questions of each task, drawn at random, with answers.",
    "fig02a_magnitudes": "Density of the task vectors' entries: most are small, with a long tail.",
    "fig02b_magnitudes": "Density of the task vectors' entries: most are small, with a long tail.",
    "fig02c_layer_norms": "How far each expert moved, layer by layer, by the layer's parameters.",
    "fig02d_layer_norms": "How far each expert moved, layer by layer, by the layer's parameters.",
    "fig03_wudi": "While WUDI minimises: its loss, and the norm of the merged task vector.",
    "fig04_optmerge": "While OptMerge minimises: its loss, and the norm of the merged task vector.",
    "figB1_steps": "Accuracy of experts and merges against the experts' training steps.",
    "figB1_terms": "The three terms of Theorem 3.1, measured at every stage of training.",
    "figxx_averages": "Average test accuracy with 95 % intervals; lines: base, experts, mixture.",
    "figxx_claims": "The lead that each claim is about, with 95 % intervals; above 0 it holds.",
    "figxx_cost": "How time and memory of a merge grow with experts, width and rank.",
    "figxx_example": "A clip as each specialist gets it, and the answers; right ones are bold.",
    "figxx_expert_matrix": "A row is a model, a column a task; merging wants the whole diagonal.",
    "figxx_interference": "Pairs of experts: cosine, opposite signs, shared input directions.",
    "figxx_orders": "Rank of each method in the paper and here; on the dotted line they are equal.",
    "figxx_radar": "Accuracy on each task: which skill a merge keeps, and which one suffers.",
    "figxx_rank_accuracy": "What an expert still knows with a part of its singular directions.",
    "figxx_samples": "Four questions of each task, with the answers that count as right.",
    "figxx_scaling": "Validation accuracy of every method against the scaling coefficient.",
    "figxx_seeds": "Average test accuracy of every method, one dot for each training seed.",
    "figxx_smol_forgetting": "Right answers against what was forgotten of SmolLM2's next words.",
    "figxx_smol_lengths": "Validation accuracy against the length of the merged task vector.",
    "figxx_spectra": "Singular values of the task vectors: a steep fall means few directions.",
    "figxx_subsets": "Accuracy with every subset of the inputs; outlined is what a question needs.",
    "figxx_training_loss": "The loss of each training run, over the share of its steps.",
    "figxx_will_it_merge": "How long the task vectors are, and what merges of such experts kept.",
}
"""Stem of a figure -> what it shows."""


def findings(figures: Path, without: Collection[str] = ()) -> list[str]:
    """What came out, in sentences, as far as the tables in a folder of figures tell.

    without: stems of tables that are of an earlier run.
    """
    scores = [figures / f"{stem}.csv" for stem in SCORES if stem not in without]
    claims = [] if CLAIMS in without else _claims(figures / f"{CLAIMS}.csv")
    return [*_best(scores), *claims]


def _best(tables: list[Path]) -> list[str]:
    from optmerge_core.figures import LABELS  # takes pandas, which a refused recipe does without

    names = set(LABELS.values()) - {LABELS["base_model"], LABELS["mixture"]}
    for path in tables:
        rows = _rows(path)
        scores = {next(iter(row.values())): float(row["Avg"]) for row in rows if row.get("Avg")}
        merged = {name: score for name, score in scores.items() if name in names}
        if not merged:
            continue
        best = max(merged, key=merged.get)
        others = {"the base model": scores.get(LABELS["base_model"])}
        others |= {"the experts, each on its own task,": _own(rows)}
        others |= {"mixture training": scores.get(LABELS["mixture"])}
        said = [f"{name} {score:.1f} %" for name, score in others.items() if score is not None]
        beside = f"; {', '.join(said)}" if said else ""
        return [f"Best merge: {best}, {merged[best]:.1f} % of the test questions{beside}."]
    return []


def _own(rows: list[dict[str, str]]) -> float | None:
    """The mean of each expert's accuracy on the task of its name."""
    names = [(row, row.get("method", "").removeprefix("Individual ")) for row in rows]
    own = [float(row[task]) for row, task in names if row.get(task)]
    return sum(own) / len(own) if own else None


def _claims(path: Path) -> list[str]:
    from optmerge_core.evaluation.verdicts import FAILS, HOLDS, UNDECIDED, UNTESTABLE

    verdicts: defaultdict[str, list[str]] = defaultdict(list)
    for row in _rows(path):
        if row.get("verdict"):
            verdicts[row["verdict"]].append(row["claim"])
    total = sum(map(len, verdicts.values()))
    order = [verdict for verdict in (HOLDS, FAILS, UNDECIDED, UNTESTABLE) if verdict in verdicts]
    return [
        f"{verdict.capitalize()} ({len(verdicts[verdict])} of the paper's {total} claims): "
        f"{'; '.join(verdicts[verdict])}."
        for verdict in order
    ]


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return [*csv.DictReader(file)]
