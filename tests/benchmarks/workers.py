"""One merge by one local worker and by two: how near is two to twice as fast, and to the estimate?

`python tests/benchmarks/workers.py [--scale 1.0] [--folder DIR]` writes six random checkpoints of
0.75 GB, plans a merge by OptMerge in at least twenty parts, and gives them to Ray with one core,
then with two: processes of one thread, imports included, joining not. The output must be the same.
workers.csv keeps who merged which part in how many seconds, beside what `study.scale` says of it;
readme.py writes both into the README. It ends with an error where two are less than 1.6 times as
fast as one.
"""

import argparse
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
from floors import RESULTS, device_name
from models import HALF_B, write_models
from rich.console import Console
from rich.table import Table

from optmerge_core import join, load_plan, plan_merge
from optmerge_core.merging.plan import MergePlan
from optmerge_core.study.cluster import part_tasks
from optmerge_core.study.engine import run_tasks
from optmerge_core.study.scale import Rates, bytes_read

WORKERS, EFFICIENCY, PARTS = (1, 2), 0.8, 20
TABLE = RESULTS.with_name("workers.csv")
SCALING = RESULTS.with_name("scaling.csv")
METHOD = {"method": "optmerge", "method_options": {"preset": "lora"}}


def plan_of(folder: Path, workers: int, scale: float) -> MergePlan:
    base, *experts = sorted(x for x in folder.iterdir() if x.name.startswith(("base", "expert")))
    size = {"max_part_size": max(1, int((20e6 if scale == 1 else 1e6) * scale**2))}
    output = folder / f"by{workers}"
    return plan_merge(base, {x.name: x for x in experts}, output, device="cpu", **METHOD, **size)


def merged_by(folder: Path, workers: int, scale: float, rates: Rates) -> tuple[list[dict], dict]:
    """A row for each part; and the output's hashes."""
    import ray

    plan = plan_of(folder, workers, scale)
    assert scale != 1 or len(plan.parts) >= PARTS, f"only {len(plan.parts)} parts"
    path = str(plan.save(folder / f"by{workers}.json"))
    ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        started = time.perf_counter()
        done = run_tasks(part_tasks(load_plan(path), path), "local", f"{workers} workers")
        seconds = time.perf_counter() - started
    finally:
        ray.shutdown()
    report = join(load_plan(path))
    names = {name: number for number, name in enumerate(report.workers)}
    by = {part: names[name] for name, parts in report.workers.items() for part in parts}
    rows = []
    for number, part in enumerate(plan.parts):
        read = bytes_read(plan.parameters, part)
        rows.append({
            "workers": workers, "all (s)": seconds, "part": number, "worker": by[number],
            "cost": part.cost, "read (GB)": read / 1e9, "part (s)": done[number].seconds,
            "expected (s)": rates.seconds(part.cost, read),
        })  # fmt: skip
    return rows, report.weights


def efficiency(table: pd.DataFrame) -> float:
    """Of two workers: 1 where they take half of the time of one."""
    seconds = table.groupby("workers")["all (s)"].first()
    return float(seconds[1] / (2 * seconds[2]))


def main(scale: float, folder: str | None) -> int:
    rates = Rates.measured(pd.read_csv(SCALING), pd.read_csv(RESULTS))
    with TemporaryDirectory(dir=folder) as temporary:
        place = Path(temporary)
        write_models(place, HALF_B, scale)
        found = [merged_by(place, workers, scale, rates) for workers in WORKERS]
    (one, hashes), (two, others) = found
    assert hashes == others, "two workers wrote other bytes than one"
    table = pd.DataFrame([*one, *two])
    shown = Table("workers", "worker", "parts", "part (s)", "expected (s)", "all (s)")
    for (workers, worker), own in table.groupby(["workers", "worker"]):
        parts = ", ".join(map(str, own["part"]))
        sums = [f"{own[name].sum():.3g}" for name in ("part (s)", "expected (s)")]
        shown.add_row(str(workers), str(worker), parts, *sums, f"{own['all (s)'].iloc[0]:.3g}")
    Console(width=140).print(shown)
    print(f"efficiency of two workers: {efficiency(table):.2f}, at least {EFFICIENCY} is wanted")
    if scale != 1:
        return 0
    table.insert(0, "device", device_name().split(",")[0])  # each process has one thread
    table.to_csv(TABLE, index=False, float_format="%.4g")
    return int(efficiency(table) < EFFICIENCY)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=float, default=1.0, help="shrinks every side, for a try")
    parser.add_argument("--folder", help="where the checkpoints are written; 6 GB are needed")
    sys.exit(main(**vars(parser.parse_args())))
