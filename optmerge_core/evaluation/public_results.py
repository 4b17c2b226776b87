"""Results of the paper's public benchmarks, as lmms-eval and VLMEvalKit write them.

`read_results` finds and reads their files, `beside_paper` sets the scores beside the paper's.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from optmerge_core.evaluation.public_benchmarks import BENCHMARKS, columns, published

OTHER_MEASURE = "over all questions, where the paper averages its geometry parts"
OLD_METRICS = {"llm_as_judge_eval": "gpt_eval_score"}  # in earlier versions of lmms-eval
PERCENT_METRICS = ("llm_as_judge_eval", "mathvision_standard_eval")  # the others are shares
COLUMNS = {  # of VLMEvalKit's result files: what a row is, its value
    "MathVista": ("Task&Skill", "acc"),
    "MathVision": ("Subject", "acc"),
    "RefCOCODataset": ("Split", "Precision@1"),
}
SHARES = ("MMMUDataset", "ImageMCQDataset")  # its multiple choice results; the others are per cent


def read_results(paths: str | Path | Iterable[str | Path]) -> pd.DataFrame:
    """The scores in result files of lmms-eval and VLMEvalKit, each recognised by its form.

    `paths`: files, or folders searched with all their subfolders. Columns: model, benchmark (the
    paper's column), value (per cent; NaN where the file has an empty or another text in its place),
    metric, differs (empty where it is what the paper measures, else how it is not), file, toolkit,
    questions (how many were asked; NaN where the file does not say). Other benchmarks' files in a
    folder are left out with a warning; another says where the toolkits' scores of a model differ.
    Raises `ValueError`, naming the file, for one that cannot be read, for a value out of range, for
    two values of the same thing, and if nothing is found.
    """
    paths = [paths] if isinstance(paths, str | Path) else list(paths)
    rows, others = [], []
    for path, named in _result_files([Path(path) for path in paths]):
        found, unknown = _read_file(path)
        if named and not found:
            raise ValueError(
                f"{path}: none of the paper's benchmarks in it"
                + (f", only {', '.join(unknown)}" if unknown else "; is it a result file?")
            )
        rows += found
        others += [f"{name} ({path})" for name in unknown]
    if others:
        warnings.warn(f"not among the paper's benchmarks: {', '.join(others)}", stacklevel=2)
    if not rows:
        raise ValueError(
            f"{', '.join(map(str, paths))}: no results of the paper's benchmarks; lmms-eval writes "
            "<date>_results.json, VLMEvalKit <model>_<dataset>_acc.csv and …_score.csv"
        )
    table = pd.DataFrame(rows).drop_duplicates(
        ["model", "benchmark", "value", "differs", "toolkit"]
    )
    comparable = table[table["differs"] == ""]
    for (model, benchmark, _), same in comparable.groupby(["model", "benchmark", "toolkit"]):
        if len(same) > 1:
            places = ", ".join(f"{r.value:.2f} in {r.file}" for r in same.itertuples())
            raise ValueError(f"{benchmark} of {model} twice: {places}; give only one of them")
    if apart := disagreements(comparable):
        warnings.warn(
            f"the toolkits differ by more than two standard errors: {'; '.join(apart)}; they ask "
            "in different ways, so compare models within one of them",
            stacklevel=2,
        )
    return table.reset_index(drop=True)


def disagreements(comparable: pd.DataFrame) -> list[str]:
    """Where two toolkits' scores of a model differ by more than two standard errors, in words.

    Of a difference of two shares of as many questions, sqrt(p(1 − p)/n) each; n is lmms-eval's,
    which says it.
    """
    lines = []
    for (model, benchmark), both in comparable.groupby(["model", "benchmark"], sort=False):
        asked = both["questions"].max()
        if len(both) < 2 or math.isnan(asked):
            continue
        shares = both["value"] / 100
        error = 100 * math.sqrt((shares * (1 - shares)).sum() / asked)
        if both["value"].max() - both["value"].min() > 2 * error:
            scores = ", ".join(f"{row.value:.2f} by {row.toolkit}" for row in both.itertuples())
            lines.append(f"{benchmark} of {model} {scores}")
    return lines


def beside_paper(results: pd.DataFrame, table: str = "2", row: str = "OptMerge") -> pd.DataFrame:
    """A table of the paper's form: its row, then each model's results and their difference to it.

    `results` as from `read_results`; those that differ in what they measure are left out. Where
    both toolkits asked a model the same, it has a row for each, and what one alone asked is in
    both. Avg only where no benchmark is missing. Raises `ValueError` for an unknown row or no
    result of the table.
    """
    wanted, theirs = columns(table), published(table)
    if row not in theirs.index:
        raise ValueError(f"Table {table} has no row {row!r}; it has {', '.join(theirs.index)}")
    usable = results[(results["differs"] == "") & results["benchmark"].isin(wanted)]
    if usable.empty:
        raise ValueError(
            f"no comparable result among Table {table}'s benchmarks ({', '.join(wanted)})"
        )
    here = {}
    for model, own in usable.groupby("model"):
        twice = own["benchmark"].duplicated().any()
        for toolkit in own["toolkit"].unique() if twice else [None]:
            first = own.sort_values("toolkit", key=lambda names, t=toolkit: names != t)
            values = first.drop_duplicates("benchmark").set_index("benchmark")["value"]
            here[f"{model}, {toolkit}" if twice else model] = values.reindex(wanted)
    here = pd.DataFrame.from_dict(here, orient="index")
    if "Avg" in theirs:
        here["Avg"] = here.mean(axis=1, skipna=False)
    paper = theirs.loc[row, here.columns]
    rows = {f"{row} (paper)": paper}
    for model, values in here.iterrows():
        rows |= {model: values, f"{model}, difference": values - paper}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("method")


def remarks(results: pd.DataFrame, table: str = "2") -> list[str]:
    """What is missing of a table's benchmarks, and what was read but measures something else."""
    lines = []
    for model, rows in results.groupby("model", sort=False):
        here = rows[rows["benchmark"].isin(columns(table))]
        found = set(here["benchmark"][here["differs"] == ""])
        for row in here.itertuples():
            if math.isnan(row.value):
                lines.append(f"{model}: {row.benchmark} {row.differs} ({row.file})")
            elif row.benchmark not in found:
                lines.append(f"{model}: {row.benchmark} {row.value:.2f} {row.differs} ({row.file})")
        absent = [name for name in columns(table) if name not in found]
        if absent:
            lines.append(f"{model}: missing {', '.join(absent)}, so no average")
    return lines


def _result_files(paths: list[Path]) -> list[tuple[Path, bool]]:
    """Result files and whether each was named, without repetition: VLMEvalKit links its latest."""
    files: dict[Path, tuple[Path, bool]] = {}
    pattern = re.compile(r".*results\.json|.+_(?:acc|score)\.(?:csv|json)")
    for path in paths:
        if path.is_dir():
            found = [x for x in sorted(path.rglob("*")) if pattern.fullmatch(x.name)]
            files |= {x.resolve(): (x, False) for x in found if x.is_file()}
        elif path.is_file():
            files[path.resolve()] = (path, True)
        else:
            raise ValueError(f"{path}: no such file or folder")
    return list(files.values())


def _read_file(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of `read_results`, and the names of benchmarks the paper has not."""
    try:
        if path.suffix == ".csv":
            content = pd.read_csv(path)
        else:
            content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable ({' '.join(str(error).split())})") from error
    if isinstance(content, dict) and isinstance(content.get("results"), dict):
        return _read_lmms_eval(path, content)
    for dataset in sorted({x.dataset for x in BENCHMARKS.values() if x.dataset}, key=len):
        match = re.fullmatch(rf"(.+)_{re.escape(dataset)}(?:_acc|(?:_.+)?_score)", path.stem)
        if match:
            return _read_vlmevalkit(path, content, match[1], dataset), []
    return [], [path.stem]


def _read_lmms_eval(path: Path, content: dict[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
    """`results`: task -> "metric,filter" -> value, with the model and the number of questions."""
    rows, unknown = [], []
    model = str(content.get("model_name") or "").rstrip("/").rpartition("/")[2] or path.parent.name
    by_task = {x.task: (name, x.metric) for name, x in BENCHMARKS.items() if x.task}
    for task, scores in content["results"].items():
        if not isinstance(scores, dict):
            raise ValueError(f"{path}: {task} has no scores by metric; is it a result file?")
        if task not in by_task:  # the heading of a group has no numbers
            unknown += [task] * any(isinstance(x, float | int) for x in scores.values())
            continue
        benchmark, metric = by_task[task]
        found = {
            key: value
            for wanted in (metric, OLD_METRICS.get(metric))
            for key, value in scores.items()
            if key.partition(",")[0] == wanted
        }
        # What is empty stays only where nothing else is there.
        found = {key: x for key, x in found.items() if not math.isnan(_number(x))} or found
        if len(found) > 1:  # several filters of the answers: the one that changes nothing
            found = {key: value for key, value in found.items() if key.endswith(",none")}
        if len(found) != 1:
            raise ValueError(
                f"{path}: {task} has no single {metric}, but {', '.join(map(str, scores))}"
            )
        ((key, value),) = found.items()
        differs = OTHER_MEASURE if metric in PERCENT_METRICS else ""
        differs = _limited(content, task) or differs
        scale = 1 if metric in PERCENT_METRICS else 100
        row = _row(path, model, benchmark, value, scale, key, differs)
        counts = _mapping(_mapping(content.get("n-samples")).get(task))
        asked = _number(counts.get("effective"))
        rows.append(row | {"toolkit": "lmms-eval", "questions": asked})
    return rows, unknown


def _read_vlmevalkit(path: Path, content: Any, model: str, dataset: str) -> list[dict[str, Any]]:
    """A table: one row with the score under Overall, or a row for each part of the dataset."""
    if not isinstance(content, pd.DataFrame):
        scalars = isinstance(content, dict) and not any(
            isinstance(value, dict | list) for value in content.values()
        )
        try:
            content = pd.DataFrame([content] if scalars else content)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: not a table of scores ({error})") from error
    rows = []
    for name, benchmark in BENCHMARKS.items():
        if benchmark.dataset != dataset:
            continue
        parts, score = COLUMNS.get(benchmark.dataset_class, ("split", "Overall"))
        missing = [x for x in (score, *[parts] * bool(benchmark.rows)) if x not in content]
        if missing:
            raise ValueError(
                f"{path}: no column {missing[0]!r}, but {', '.join(map(str, content.columns))}"
            )
        values = list(content[score])
        if benchmark.rows:
            by_part = dict(zip(content[parts].astype(str).str.lower(), values, strict=True))
            absent = [part for part in benchmark.rows if part.lower() not in by_part]
            if absent:
                raise ValueError(f"{path}: no row {absent[0]!r} in column {parts!r}")
            values = [by_part[part.lower()] for part in benchmark.rows]
        elif len(values) != 1:
            raise ValueError(f"{path}: {len(values)} rows where one is expected")
        scale = 100 if benchmark.dataset_class in SHARES else 1
        scores = [_row(path, model, name, x, scale, score, "") for x in values]
        measure = f"{score}, mean of {len(scores)} parts" if len(scores) > 1 else score
        mean = sum(row["value"] for row in scores) / len(scores)
        missing = next((row["differs"] for row in scores if row["differs"]), "")
        own = {"value": mean, "metric": measure, "differs": missing}
        rows.append(scores[0] | own | {"toolkit": "VLMEvalKit", "questions": math.nan})
    return rows


def _row(
    path: Path, model: str, benchmark: str, value: Any, scale: float, metric: str, differs: str
) -> dict[str, Any]:
    """One row of `read_results`. Raises `ValueError` for a number that is no share or per cent."""
    number = _number(value) * scale
    if math.isnan(number):
        found = "empty" if value is None or isinstance(value, float) else repr(value)
        differs = f"is missing: {metric} is {found}"
    elif not 0 <= number <= 100 + 1e-9:
        raise ValueError(
            f"{path}: {benchmark}: {metric} is {value}, not a number from 0 to {100 / scale:g}"
        )
    return {
        "model": model,
        "benchmark": benchmark,
        "value": number,
        "metric": metric,
        "differs": differs,
        "file": str(path),
    }


def _number(value: Any) -> float:
    """NaN for what is none, be it empty, a text or a truth."""
    try:
        return math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return math.nan


def _limited(content: dict[str, Any], task: str) -> str:
    """Whether only some questions were asked (`--limit`, where -1 is none), in words; else ""."""
    counts = _mapping(_mapping(content.get("n-samples")).get(task))
    asked, all_there_are = counts.get("effective"), counts.get("original")
    if isinstance(asked, int) and isinstance(all_there_are, int):
        return f"of {asked} of {all_there_are} questions" if 0 < asked < all_there_are else ""
    limit = _mapping(content.get("config")).get("limit")
    return f"of a part of the questions (limit {limit:g})" if _positive(limit) else ""


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and value > 0


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
