"""optmerge benchmarks: public benchmarks of a merged model, or results beside the paper's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from optmerge_core import figures
from optmerge_core.evaluation import public_benchmarks, public_results


def hand_off(model: str, table: str, output: str | None) -> None:
    """How the toolkits are run on a model: printed, or with its scripts in a folder."""
    files = public_benchmarks.hand_off(model, table)
    if output is None:
        print(files["benchmarks.md"])
        return
    Path(output).mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        Path(output, name).write_text(text, encoding="utf-8")
    print(f"{output}: {', '.join(files)}; run each script in its toolkit's environment")


def beside_paper(paths: Sequence[str], table: str, row: str, output: str | None) -> None:
    """The toolkits' results beside a row of the paper's table: printed, with a folder saved."""
    results = public_results.read_results(paths)
    beside = public_results.beside_paper(results, table, row)
    print(f"Table {table}: {public_benchmarks.TABLES[table][1]}\n")
    print(figures.markdown(beside))
    for line in public_results.remarks(results, table):
        print(line)
    if output is not None:
        name = f"tablexx_public_benchmarks_{table}"
        print(f"saved: {figures.save_table(beside, output, name)}")
