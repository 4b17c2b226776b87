"""What a merge costs (Table 7): the shipped families' recipes from disk to disk, by the command.

`python tests/benchmarks/cost.py` merges each three times, every time in a process of its own, and
writes cost.csv: the shortest time, and the peak of memory (torch included) of that merge's report.
Notebook 03 draws Table 7 from it, with mixture training's time beside it.
"""

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
from floors import device_name
from tqdm.auto import tqdm

ROOT = Path(__file__).resolve().parents[2]
FAMILIES = ("internvl", "qwen2_vl")


def measure(name, folder):
    """A row of the table, from the report that the merge writes beside the weights."""
    recipe, output = ROOT / "data" / "recipes" / f"{name}.yaml", Path(folder, name)
    command = ("-m", "optmerge_core", "merge", recipe, "--output", output)
    options = ("--overwrite", "--no-check")
    subprocess.run([sys.executable, *command, *options], check=True, stdout=subprocess.DEVNULL)
    report = json.loads((output / "merge_report.json").read_text())
    row = {"recipe": name, "device": device_name(), "seconds": report["seconds"]}
    return row | {"peak memory (GB)": report["peak_memory_bytes"] / 1e9}


def main():
    with TemporaryDirectory() as folder:
        runs = [measure(name, folder) for name in tqdm(3 * FAMILIES)]
    table = pd.DataFrame(runs).sort_values("seconds").drop_duplicates("recipe")
    table = table.sort_values("recipe")
    table.to_csv(Path(__file__).with_name("cost.csv"), index=False, float_format="%.4g")
    print(table.to_string(index=False))


if __name__ == "__main__":
    main()
