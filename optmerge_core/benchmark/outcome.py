"""What came out: sentences with number, interval, questions and seeds, read from studies' tables.

Intervals in them are 95 % ones over the questions.
"""

import os
import re
from pathlib import Path

import pandas as pd

from optmerge_core.benchmark.beside import BASE, MERGES, OPTMERGE
from optmerge_core.benchmark.results import order
from optmerge_core.evaluation.verdicts import UNTESTABLE
from optmerge_core.figures import LABELS
from optmerge_core.study.notebook_page import read_notebook

SUM, MIXTURE = LABELS["task_arithmetic"], LABELS["mixture"]
KINDS = ("gentle", "strong")
LEADS = {
    "OptMerge beats the base model": ("OptMerge's lead over the base model is", 9),
    "OptMerge beats the paper's other methods": (
        "OptMerge's lead over the method of the paper that is hardest to beat is", 4),
    "some merged model beats an expert on its own task": (
        "The best merge's lead over an expert on that one's own task is", 9),
    "some merged model beats mixture training": (
        "The best merge's lead over training on all tasks' data at once is", 9),
    "SGD alone hurts WUDI": ("Plain gradient descent in Adam's place costs WUDI", 5),
}  # fmt: skip
"""Claim -> how its lead is called, and the section of notebook 05 that it is from."""


def section(notebooks, notebook, number):
    """Where a section is, as JupyterLab links to it: `05_evaluation.ipynb#4-·-Is-a-…`.

    notebooks: their folder; notebook: the file's stem, or its first digits.
    """
    path = next(Path(notebooks).glob(f"{notebook}*.ipynb"))
    texts = [c.source for c in read_notebook(path).cells if c.cell_type == "markdown"]
    found = re.search(rf"^## (\D*{number} · .*)$", "\n".join(texts), re.MULTILINE)
    if found:
        return f"{path.name}#{found[1].strip().replace(' ', '-')}"
    raise ValueError(f"{path.name} has no section {number}")


def _row(statement, parts, results, file, notebook, number, questions=None):
    """A sentence: statement, and of each study its part; what it rests on, and where it is from."""
    return {
        "what came out": f"{statement} {'; '.join(parts)}.",
        "questions": max(r.questions for r in results) if questions is None else questions,
        "seeds": max(r.seeds for r in results),
        "file": f"{results[0].name}/{file}.csv",
        "notebook": notebook,
        "section": number,
    }


def _number(value, digits=1):
    """With its sign, and none before a zero."""
    return (
        f"{round(value, digits) + 0.0:+.{digits}f}" if round(value, digits) else f"{0:.{digits}f}"
    )


def _between(low, high, digits=1):
    return f"({round(low, digits) + 0.0:.{digits}f} to {round(high, digits) + 0.0:.{digits}f})"


def _lead(results, claim):
    """A claim's lead in one study, its interval and verdict."""
    row = results.table("tablexx_claims").loc[claim]
    said = row["verdict"] if pd.isna(row["why"]) else f"{row['verdict']} ({row['why']})"
    if row["verdict"] == UNTESTABLE:
        return f"on {results.label}: {said}"
    between = _between(row["low"], row["high"])
    return f"{_number(row['lead'])} points {between} on {results.label}: {said}"


def ten_sentences(studies, omni, papers):
    """What came out, as rows: the sentence, questions a model, training seeds, file, section.

    studies: Results of studies that merge capabilities; omni: of one that merges modalities;
    papers: study -> the paper's averages by method, where it has a table of it. `file` lies in the
    folder of all figures, and is the first study's; the others have one of the same name.
    """
    rows = [_covers(studies)]
    for claim, (statement, number) in LEADS.items():
        leads = [_lead(r, claim) for r in studies]
        rows.append(_row(statement, leads, studies, "tablexx_claims", "05", number))
    rows += [_order(studies, papers), _direction(studies), _cost(studies), _omni(omni)]
    return pd.DataFrame(rows)


def _covers(studies):
    found = [(r, *r.covered()) for r in studies]
    parts = [f"{share:.0f} % {_between(*ends, 0)} on {r.label}" for r, share, *ends in found]
    statement = "Of the way from the base model to the experts on their own tasks OptMerge covers"
    return _row(statement, parts, studies, studies[0].stem, "05", 3) | {"seeds": 1}


def _order(studies, papers):
    told = [(r, order(papers[r.name], r)) for r in studies if r.name in papers]
    parts = [
        f"{_number(x['ρ'], 2)} {_between(x['low'], x['high'], 2)} on {r.label}" for r, x in told
    ]
    statement = "The order of the methods agrees with the paper's by a Spearman's ρ of"
    return _row(statement, parts, studies, studies[0].stem, "08", 3) | {"seeds": 1}


def _direction(studies):
    matched = {r.label: r.table("tablexx_norm_matched").loc[OPTMERGE] for r in studies}
    parts = [
        f"{_number(row['direction'])} points by its direction and {_number(row['length'])} by its "
        f"length on {label}"
        for label, row in matched.items()
    ]
    size = studies[0].recipe.evaluation.test_samples
    asked = studies[0].questions // size * (size // 3)  # that section asks a third of each task
    statement = "OptMerge's lead over the plain sum is"
    return _row(statement, parts, studies, "tablexx_norm_matched", "05", 6, asked) | {"seeds": 1}


def _cost(studies):
    costs = {r.label: r.table("table07_cost")["seconds"] for r in studies}
    parts = [
        f"{cost.iloc[0]:.1f} s ({100 * cost.iloc[0] / cost.iloc[-1]:.2g} %) on {label}"
        for label, cost in costs.items()
    ]
    statement = "OptMerge's time, and its share of that of training on all tasks' data, is"
    return _row(statement, parts, studies, "table07_cost", "03", 7, 0) | {"seeds": 0}


def _omni(omni):
    scores = omni.scores["Avg"]
    best = scores[[n for n in LABELS.values() if n in scores.index]].idxmax()
    parts = [f"the base model has {scores[BASE]:.1f} %, OptMerge {scores[OPTMERGE]:.1f} %"]
    if omni.by_seed is not None:
        leads = omni.by_seed[OPTMERGE] - omni.by_seed[BASE]
        parts.append(f"by seed a lead of {_number(leads.min())} to {_number(leads.max())} points")
    parts.append(f"the best merge, {best}, has {scores[best]:.1f} %")
    asked = omni.scores.columns.get_loc("one modality") * omni.recipe.evaluation.test_samples
    statement = "Right answers to questions about clips to be seen and heard:"
    return _row(statement, parts, [omni], omni.stem, "04", 6, asked)


def advice(studies, comparison):
    """What follows for somebody who merges, as rows like those of `ten_sentences`.

    comparison: the folder with notebook 06's tables.
    """
    first = studies[:1]
    strong = pd.read_csv(Path(comparison, "tablexx_strong_experts.csv"), index_col=0).loc[OPTMERGE]
    kept = [f"{strong[f'{kind}, % of the gap']:.0f} % ({kind} experts)" for kind in KINDS]
    statement = "Merge experts that were trained gently: of their gain OptMerge keeps"
    gentle = _row(statement, kept, first, "", "06", 6, first[0].questions * 3 // 10)
    rules = first[0].table("tablexx_will_it_merge_rules")["both: right"]
    noise = first[0].table("tablexx_noise_floor").filter(like="noise").max()
    hours = first[0].table("tablexx_expected_cost")["hours"]
    rows = [
        *map(_choice, studies), _behind(studies),
        gentle | {"file": "comparison/tablexx_strong_experts.csv", "seeds": 1},
        _row("Look before you merge (`optmerge inspect`); how often its rules were right:",
             [f"{rule}, {share:.0f} %" for rule, share in rules.items()],
             first, "tablexx_will_it_merge_rules", "01", 8, 0) | {"seeds": 0},
        _row("Keep experts in float32, or their adapters: rounding blurs a task vector by",
             [f"{share:.2g} % of its norm, {name.split(': ')[1]}" for name, share in noise.items()],
             first, "tablexx_noise_floor", "02", 4, 0) | {"seeds": 0},
        _row("No GPU is needed: on two cores OptMerge of five experts takes about",
             [f"{_hours(value)} for {model}" for model, value in hours.items()],
             first, "tablexx_expected_cost", "03", 7, 0) | {"seeds": 0},
    ]  # fmt: skip
    return pd.DataFrame(rows)


def _choice(results):
    """Which method by the mean of the training seeds, and how much hangs on it."""
    seeds = results.by_seed
    scores = results.scores["Avg"] if seeds is None else seeds.mean()
    merges = scores[[n for n in MERGES if n in scores.index]]
    parts = [f"{merges.idxmax()}, {merges.max() - merges[SUM]:.1f} points ahead of the plain sum"]
    parts.append(f"all methods lie within {merges.max() - merges.min():.1f} points")
    mean = "by the mean of the seeds the best is" if results.seeds > 1 else "the best is"
    return _row(f"Of {results.label} {mean}", parts, [results], results.stem, "05", 3)


def _hours(value):
    return f"{60 * value:.2g} minutes" if value < 1 else f"{value:.2g} hours"


def _behind(studies):
    parts = [
        f"{r.scores['Avg'][MIXTURE] - r.scores['Avg'][OPTMERGE]:.1f} points on {r.label}"
        for r in studies
    ]
    statement = "If the data are at hand, train on all of them at once: OptMerge stays behind by"
    return _row(statement, parts, studies, studies[0].stem, "05", 3) | {"seeds": 1}


def linked(outcomes, notebooks, figures, start):
    """The sentences as a list in Markdown, each with what it rests on and links to cell and file.

    notebooks, figures: those folders; start: the folder that the text is read in.
    """
    lines = []
    for number, row in enumerate(outcomes.to_dict("records"), 1):
        place = section(notebooks, row["notebook"], row["section"])
        links = f"[{row['notebook']}, section {row['section']}]({_link(notebooks, start)}{place})"
        links += f", [table]({_link(figures, start)}{row['file']})"
        rests = [f"{row['questions']} questions a model"] if row["questions"] else []
        rests += [f"{row['seeds']} training seed{'s' * (row['seeds'] > 1)}"] if row["seeds"] else []
        said = "; ".join(filter(None, (", ".join(rests), links)))
        lines.append(f"{number}. {row['what came out']} ({said})")
    return "\n".join(lines) + "\n"


def _link(folder, start):
    """The folder as a link's beginning; nothing if the text is read there."""
    path = Path(os.path.relpath(folder, start)).as_posix()
    return "" if path == "." else f"{path}/"
