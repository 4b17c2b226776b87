"""The README's table of what a merge costs, from results.csv: `python tests/benchmarks/readme.py`.

It has the merges whose time is shared out (models.py, by shares.py), and OptMerge at the shape of a
7B model on a GPU (device.py), whose cells stay empty until one has been at hand.
"""

import re
from pathlib import Path

import pandas as pd
from floors import RESULTS
from shares import KINDS

README = Path(__file__).resolve().parents[2] / "README.md"
BLOCK = re.compile(r"(?<=<!-- costs -->\n).*?(?=<!-- /costs -->)", re.DOTALL)
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
    if on_a_gpu.empty:
        rows.append([ON_A_GPU, *[""] * (len(HEADER) - 1)])
    rule = ["---", "---", "--:", "--:", "---", *["--:"] * (len(HEADER) - 5)]
    table = "".join(f"| {' | '.join(row)} |\n" for row in (HEADER, rule, *rows))
    return table + (f"\n{NO_GPU}" if on_a_gpu.empty else "")


def main() -> None:
    text = README.read_text(encoding="utf-8")
    README.write_text(BLOCK.sub(lambda _: block(pd.read_csv(RESULTS)), text), encoding="utf-8")
    print(block(pd.read_csv(RESULTS)))


if __name__ == "__main__":
    main()
