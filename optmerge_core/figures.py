"""Figures and tables: one colour per method everywhere, each figure saved with its numbers.

Colours are Okabe and Ito's, safe for colour-blind readers; markers tell methods apart in greyscale.
"""

from itertools import cycle
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
}
"""Key of a method or model -> its name in the paper's tables."""

COLORS = {
    "base_model": "#bbbbbb",
    "weight_average": "#999999",
    "task_arithmetic": "#e69f00",
    "ties": "#56b4e9",
    "dare_task_arithmetic": "#f3c766",
    "dare_ties": "#a5d5f2",
    "tsv": "#009e73",
    "iso_c": "#cc79a7",
    "wudi": "#0072b2",
    "optmerge": "#d55e00",
    "swudi": "#f0e442",
    "aswudi": "#5b4a8a",
    "mixture": "#222222",
}
MARKERS = dict(zip(COLORS, "ohsv^<>DPXd*p", strict=True))
EXPERT_COLORS = [
    "#0072b2",
    "#e69f00",
    "#009e73",
    "#d55e00",
    "#cc79a7",
    "#56b4e9",
    "#f0e442",
    "#222222",
]


def use_style():
    """The look of every figure: white, thin grid; the same numbers give the same file."""
    with extra("plots"):
        import matplotlib.pyplot as plt
        import seaborn as sns

    sns.set_theme(context="notebook", style="whitegrid", font_scale=0.9)
    plt.rcParams.update(
        {"figure.dpi": 100, "savefig.dpi": 200, "svg.hashsalt": "optmerge", "svg.fonttype": "none"}
    )


def expert_palette(experts):
    """Expert name -> colour, in the order given."""
    return dict(zip(experts, cycle(EXPERT_COLORS), strict=False))


def save_figure(figure, data, output_dir, name):
    """Write `<name>.png`, `<name>.svg` and the numbers behind them as `<name>.csv`.

    name: the paper's number first, such as `fig02a_magnitudes`. Returns the path of the PNG.
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.png", bbox_inches="tight")
    figure.savefig(folder / f"{name}.svg", bbox_inches="tight", metadata={"Date": None})
    pd.DataFrame(data).to_csv(folder / f"{name}.csv", index=False, float_format="%.6g")
    return folder / f"{name}.png"


def save_table(table, output_dir, name, decimals=2):
    """Write `<name>.csv` and `<name>.md` (for reading); the index is the first column."""
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    table.to_csv(folder / f"{name}.csv", float_format="%.6g")
    (folder / f"{name}.md").write_text(markdown(table, decimals))
    return folder / f"{name}.csv"


def markdown(table, decimals=2):
    """A table as GitHub markdown, numbers rounded to `decimals`, gaps as a dash.

    Not pandas' `to_markdown`: that needs tabulate, and leaves a bar within a cell as it is.
    """

    def cell(value):
        if pd.isna(value):
            return "–"
        return f"{value:.{decimals}f}" if isinstance(value, float) else str(value)

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
