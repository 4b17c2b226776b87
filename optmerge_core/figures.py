"""Figures and tables: one colour per method everywhere, each figure saved with its numbers.

Each has a contrast of 3 or more on white, and is as far from all others for colour-blind readers as
tests/test_palette.py asks; markers tell methods apart in greyscale.
"""

from itertools import cycle
from math import floor, isfinite, log10
from pathlib import Path

import pandas as pd

from optmerge_core.errors import extra

LABELS = {
    "base_model": "Base model",
    "weight_average": "Weight Average",
    "task_arithmetic": "Task Arithmetic",
    "ties": "TIES Merging",
    "dare_task_arithmetic": "TA w/ DARE",
    "dare_ties": "TIES w/ DARE",
    "tsv": "TSV Merging",
    "iso_c": "Iso-C",
    "wudi": "WUDI Merging",
    "optmerge": "OptMerge",
    "swudi": "SWUDI",
    "aswudi": "ASWUDI",
    "mixture": "Mixture Training",
    "iso_cts": "Iso-CTS",
    "dc_merge": "DC-Merge",
    "ssam": "SSAM",
    "orthomerge": "OrthoMerge",
    "breadcrumbs": "Model Breadcrumbs",
    "breadcrumbs_ties": "TIES w/ Breadcrumbs",
    "della": "DELLA",
    "della_linear": "TA w/ DELLA",
    "sce": "SCE",
    "model_stock": "Model Stock",
    "slerp": "SLERP",
    "nuslerp": "NuSLERP",
}
"""Key of a method or model -> its name in the paper's tables."""

COLORS = {
    "base_model": "#444444",
    "weight_average": "#888888",
    "task_arithmetic": "#aa8844",
    "ties": "#002255",
    "dare_task_arithmetic": "#dd7711",
    "dare_ties": "#885588",
    "tsv": "#007744",
    "iso_c": "#dd66cc",
    "wudi": "#4488ff",
    "optmerge": "#bb0000",
    "swudi": "#771111",
    "aswudi": "#4433bb",
    "mixture": "#111111",
    "iso_cts": "#aa44bb",
    "dc_merge": "#8800ff",
    "ssam": "#ff00ff",
    "orthomerge": "#ee3377",
    "breadcrumbs": "#aa3333",
    "breadcrumbs_ties": "#880088",
    "della": "#440088",
    "della_linear": "#663366",
    "sce": "#9911dd",
    "model_stock": "#331133",
    "slerp": "#552222",
    "nuslerp": "#aa88aa",
}
MARKERS = dict(zip(COLORS, [*"ohsv^<>DPXd*p1234+x|_8H.", "$n$"], strict=True))
EXPERT_COLORS = [
    "#220088",
    "#dd4422",
    "#0088aa",
    "#779966",
    "#aa2266",
    "#005599",
    "#ff11ee",
    "#661122",
]
"""Of tasks and their experts; far from those of the methods in the tables."""

DIGITS = 4
"""Significant digits of a stored number; other machines agree to five or more."""

RESOLUTION = 1e-5
"""Of the largest number of a column: what lies below is the noise of float32, and stored as 0."""

METADATA = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}
"""Nothing in a file tells when and by which version it was written."""


def use_style():
    """The look of every figure: white, thin grid."""
    with extra("plots"):
        import matplotlib.pyplot as plt
        import seaborn as sns

    sns.set_theme(context="notebook", style="whitegrid", font_scale=0.9)
    plt.rcParams.update({"figure.dpi": 100, "savefig.dpi": 200, "svg.fonttype": "none"})


def expert_palette(experts):
    """Expert name -> colour, in the order given."""
    return dict(zip(experts, cycle(EXPERT_COLORS), strict=False))


def as_stored(table, output_dir, name, one_answer=None):
    """The table as `<name>.csv` in `output_dir` keeps it: what a figure is drawn from.

    Numbers have DIGITS digits, those below RESOLUTION of the largest in their column are 0, whole
    numbers and texts stay. Rounding alone would not do: among thousands of numbers some lie on the
    edge of two. So where the file has a number already, that one stays if the new one is no more
    than one unit of its last digit away, or RESOLUTION of the column's largest, or one answer.
    one_answer: column of scores -> what an answer more is in it; a near tie may fall otherwise on
    another machine.
    """
    kept, before = pd.DataFrame(table).copy(), _read(Path(output_dir, f"{name}.csv"))
    before = before.iloc[:, -kept.shape[1] :]  # without the index
    if before.shape != kept.shape:
        before = pd.DataFrame(index=kept.index, columns=kept.columns)
    for place in range(kept.shape[1]):
        new, old = kept.iloc[:, place], before.iloc[:, place]
        if any(map(_measured, new)):
            noise = RESOLUTION * max(abs(_rounded(x)) for x in new if _measured(x))
            turn = (one_answer or {}).get(kept.columns[place], 0.0)
            cells = [_stored(x, y, noise, turn) for x, y in zip(new, old, strict=True)]
            kept.isetitem(place, cells)
    return kept


def _read(path):
    """A table written before; an empty one where there is none, or something else."""
    try:
        return pd.read_csv(path)
    except (OSError, ValueError):
        return pd.DataFrame()


def _measured(x):
    return isinstance(x, float) and isfinite(x)


def _rounded(x):
    return x if x.is_integer() else float(f"{x:.{DIGITS}g}")


def _stored(new, old, noise, turn):
    """What is kept of one cell, given what the file has there; below `noise` nothing is."""
    if not _measured(new):
        return new
    value = _rounded(new)
    if isinstance(old, int | float) and isfinite(old):
        old = _rounded(float(old)) if abs(old) >= noise else 0.0
        unit = 10.0 ** (floor(log10(abs(old))) - DIGITS + 1) if old else 0.0
        exact = new.is_integer() and old.is_integer() and not turn  # a count, say
        if not exact and abs(value - old) <= max(1.01 * unit + turn, noise):
            return old
    return value if abs(value) >= noise else 0.0


def save_figure(figure, data, output_dir, name):
    """Write `<name>.png`, `<name>.svg` and the numbers behind them as `<name>.csv`.

    name: the paper's number first, such as `fig02a_magnitudes`. Draw from `as_stored(data, …)`:
    then every machine of a kind writes the same files. Returns the path of the PNG.
    """
    with extra("plots"):
        from matplotlib import rc_context

    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with rc_context({"svg.hashsalt": "optmerge"}):
        for suffix, metadata in METADATA.items():
            path = folder / f"{name}.{suffix}"
            figure.savefig(path, bbox_inches="tight", metadata=metadata)
    as_stored(data, folder, name).to_csv(folder / f"{name}.csv", index=False, float_format="%.10g")
    return folder / f"{name}.png"


def save_table(table, output_dir, name, decimals=2, one_answer=None):
    """Write `<name>.csv` and `<name>.md` (for reading); the index is the first column.

    Both hold the numbers `as_stored`, which says what one_answer is; measured seconds and bytes
    belong to the run, not in here.
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    table = as_stored(table, folder, name, one_answer)
    table.to_csv(folder / f"{name}.csv", float_format="%.10g")
    (folder / f"{name}.md").write_text(markdown(table, decimals, DIGITS))
    return folder / f"{name}.csv"


def save_answers(answers, output_dir, name):
    """Write `<name>.parquet`, one row an answer; columns task, model, prediction, correct, ….

    The file of an earlier run stays while no model has more than one other answer in a task.
    """
    path = Path(output_dir, f"{name}.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    said = ["prediction", "correct"]
    before = pd.read_parquet(path) if path.is_file() else pd.DataFrame(columns=said)
    if before.drop(columns=said).equals(answers.drop(columns=said)):
        turned = answers.assign(turned=answers["prediction"] != before["prediction"].to_numpy())
        if turned.groupby(["model", "task"])["turned"].sum().max() <= 1:
            return path
    answers.to_parquet(path)
    return path


def markdown(table, decimals=2, digits=None):
    """A table as GitHub markdown, numbers rounded to `decimals`, gaps as a dash.

    digits: significant ones that the numbers have; no more are shown, but for small whole numbers.
    Not pandas' `to_markdown`: that needs tabulate, and leaves a bar within a cell as it is.
    """

    def cell(value):
        if pd.isna(value):
            return "–"
        if not isinstance(value, float):
            return str(value)
        places = decimals
        if digits and isfinite(value) and not (value.is_integer() and abs(value) < 1000):
            places = max(0, min(decimals, digits - 1 - floor(log10(abs(value)))))
        return f"{value:.{places}f}"

    header = [table.index.name or "", *table.columns]
    rows = zip(table.index, table.itertuples(index=False), strict=True)
    lines = [header, ["---"] * len(header), *([index, *map(cell, row)] for index, row in rows)]
    escaped = [[str(text).replace("|", r"\|") for text in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in escaped) + "\n"


def paper_table(folder, name):
    """A published table from data/paper, its first column as the index."""
    return pd.read_csv(Path(folder, f"{name}.csv"), index_col=0)


def compare(paper, here):
    """Columns paper, here, difference for two series with the same kind of index."""
    table = pd.DataFrame({"paper": paper, "here": here}).reindex(here.index)
    table["difference"] = table["here"] - table["paper"]
    return table
