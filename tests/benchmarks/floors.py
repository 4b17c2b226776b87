"""What this machine can do at best, and the table of what was measured on which."""

import platform
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).with_name("results.csv")


def best_seconds(work: Callable[[], object], device: str = "cpu", repeats: int = 5) -> float:
    """The shortest of several runs: on a shared machine the others measure the neighbours."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times)


def copy_bandwidth(megabytes: int = 256, device: str = "cpu") -> float:
    """Bytes read plus bytes written per second, in memory."""
    source = torch.ones(megabytes * 10**6 // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / best_seconds(lambda: target.copy_(source), device)


def matmul_rate(size: int = 2048, dtype: torch.dtype = torch.float32, device: str = "cpu") -> float:
    """Floating-point operations per second of a product of two square matrices."""
    a, b = torch.randn(2, size, size, dtype=dtype, device=device)
    return 2 * size**3 / best_seconds(lambda: a @ b, device)


def device_name() -> str:
    """The GPU's name, or the processor's and the number of threads torch has."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"


def record(rows: list[dict]) -> None:
    """Put measurements into results.csv, in the place of older ones of that case and device."""
    new = pd.DataFrame([{"device": device_name()} | row for row in rows])
    if RESULTS.exists():
        old = pd.read_csv(RESULTS)
        keys = ["device", "case"]
        again = old.set_index(keys).index.isin(new.set_index(keys).index)
        new = pd.concat([old[~again], new])
    new.to_csv(RESULTS, index=False, float_format="%.4g")


def show(title: str, rows: list[dict]) -> None:
    """Print the rows as a table, with ours over the floor and the other over ours."""
    frame = pd.DataFrame(rows)
    frame["ours / floor"] = frame["ours (s)"] / frame["floor (s)"]
    if "other (s)" in frame:
        frame["other / ours"] = frame["other (s)"] / frame["ours (s)"]
    table = Table(*frame.columns, title=f"{title}: {device_name()}")
    for row in frame.itertuples(index=False):
        cells = ["" if pd.isna(x) else f"{x:.3g}" if isinstance(x, float) else str(x) for x in row]
        table.add_row(*cells)
    Console(width=140).print(table)
