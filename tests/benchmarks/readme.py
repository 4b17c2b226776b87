"""The README's tables of what a merge costs, and will cost: `python tests/benchmarks/readme.py`.

The first, from results.csv, has the merges whose time is shared out (models.py, by shares.py), and
OptMerge at the shape of a 7B model on a GPU (device.py), whose cells stay empty until one has been
at hand. The second is `study.scale`'s, beside what workers.py has measured of it. And the README's
first sentences, of those that notebook 08 has written.
"""

import re
import textwrap
from pathlib import Path

import pandas as pd
from floors import RESULTS
from shares import KINDS
from workers import SCALING, TABLE, efficiency

from optmerge_core.benchmark.outcome import linked
from optmerge_core.study.scale import EXPERTS, MODELS, Rates, table

README = Path(__file__).resolve().parents[2] / "README.md"
BLOCK = re.compile(r"(?<=<!-- costs -->\n).*?(?=<!-- /costs -->)", re.DOTALL)
SCALE = re.compile(r"(?<=<!-- scale -->\n).*?(?=<!-- /scale -->)", re.DOTALL)
OUTCOME = re.compile(r"(?<=<!-- came out -->\n).*?(?=<!-- /came out -->)", re.DOTALL)
TELLING = [0, 2, 4, 8, 9]
"""Of the ten sentences the most telling ones."""
HEADER = ["Merge", "Processor", "Seconds", "Over the floor", "Peer", "Peer over ours", *KINDS]
ON_A_GPU = "Qwen2-VL-7B, 5 full experts, optmerge, compute only, scale 1"
NO_GPU = "On a GPU nothing has been measured yet: none was at hand.\n"


def number(value: float) -> str:
    """Three digits; nothing for what was not measured."""
    return "" if pd.isna(value) else f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def cells(row: pd.Series) -> list[str]:
    peer = "" if pd.isna(row["other"]) else row["other"].split(",")[0]
    return [
        row["case"], row["device"], number(row["ours (s)"]),
        number(row["ours (s)"] / row["floor (s)"]), peer,
        number(row["other (s)"] / row["ours (s)"]),
        *("" if pd.isna(share := row[f"{kind} (%)"]) else f"{share:.0f} %" for kind in KINDS),
    ]  # fmt: skip


def block(results: pd.DataFrame) -> str:
    """Markdown, with a sentence where no GPU has measured."""
    shared = results[results["computing (%)"].notna()]
    on_a_gpu = results[results["case"] == ON_A_GPU]
    rows = [cells(row) for _, row in pd.concat([shared, on_a_gpu]).iterrows()]
    rule = ["---", "---", "--:", "--:", "---", *["--:"] * (len(HEADER) - 5)]
    table = "".join(f"| {' | '.join(row)} |\n" for row in (HEADER, rule, *rows))
    return table + (f"\n{NO_GPU}" if on_a_gpu.empty else "")


def scale_block(measured: pd.DataFrame | None) -> str:
    """Markdown: parts, bytes and hours of large models; measured: workers.csv, if there is one."""
    rates = Rates.measured(pd.read_csv(SCALING), pd.read_csv(RESULTS))
    models = {name: model for name, model in MODELS.items() if not name.endswith("-1B")}
    found = table(models, rates, (1, 8, 64))
    header = ["Model", "Parts", "Read (GB)", "Written (GB)", "Memory of a worker (GB)"]
    header += [f"Hours, {n} worker{'s' * (n > 1)}" for n in (1, 8, 64)]
    rows = [[name, *map(number, row)] for name, row in found.iterrows()]
    rule = ["---", *["--:"] * (len(header) - 1)]
    lines = "".join(f"| {' | '.join(row)} |\n" for row in (header, rule, *rows))
    said = f"{_said(rates)} {_checked(measured)}"
    return f"{lines}\n{textwrap.fill(said, 100, break_on_hyphens=False)}\n"


def _said(rates: Rates) -> str:
    return (
        f"OptMerge (lora preset), {EXPERTS} full experts, bfloat16, a worker a core: "
        f"{rates.cost * 1e10:.3g} s for each 10¹⁰ of min²·max, {rates.byte * 1e9:.3g} s for each "
        "GB read, as measured (scaling.csv, results.csv); the join, by one worker, is included."
    )


def _checked(measured: pd.DataFrame | None) -> str:
    if measured is None:
        return "No run has been set beside it yet: `tests/benchmarks/workers.py` does."
    seconds = measured.groupby("workers")["all (s)"].first()
    one = measured[measured["workers"] == 1]
    share = one["part (s)"].sum() / one["expected (s)"].sum()
    return (
        f"A run of {len(one)} parts ({measured['device'].iloc[0]}) took {seconds[1]:.3g} s with "
        f"one worker, {share:.2f} of what was expected, and {seconds[2]:.3g} s with two: an "
        f"efficiency of {efficiency(measured):.2f}."
    )


def outcome_block() -> str:
    """Markdown: the telling sentences, with their links."""
    figures = README.parent / "figures"
    table = pd.read_csv(figures / "comparison" / "tablexx_came_out.csv", dtype={"notebook": str})
    return linked(table.iloc[TELLING], README.parent / "notebooks", figures, README.parent)


def main() -> None:
    blocks = {BLOCK: block(pd.read_csv(RESULTS))}
    blocks[SCALE] = scale_block(pd.read_csv(TABLE) if TABLE.exists() else None)
    blocks[OUTCOME] = outcome_block()
    text = README.read_text(encoding="utf-8")
    for place, content in blocks.items():
        text = place.sub(lambda _, content=content: content, text)
        print(content)
    README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
