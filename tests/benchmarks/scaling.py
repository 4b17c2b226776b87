"""How time and memory of a merge grow: with experts, matrix size, and from adapters with rank.

`python tests/benchmarks/scaling.py [--small]` merges matrices of (4 · width, width), the shape of
an MLP's layer, by OptMerge (lora preset), TIES and Task Arithmetic, and adapters of that shape into
one, each alone on one thread as `merge` works on a parameter, and writes scaling.csv (a row for
each: seconds, the floor, the peak of memory above the start).
"""

import argparse
import ctypes
import time
from pathlib import Path

import pandas as pd
import torch
from floors import copy_bandwidth, device_name, matmul_rate, show
from layer import floor_flops
from tqdm.auto import tqdm

from optmerge_core.merging.spaces import merge_factors
from optmerge_core.methods.registry import METHODS
from optmerge_core.runtime import peak_memory, reset_peak_memory

EXPERTS, WIDTHS, RANKS = (2, 3, 5, 10, 20), (128, 256, 512, 1024, 2048), (4, 8, 16, 32, 64)
OPTIONS = {"optmerge": {"preset": "lora"}}
CPU = torch.device("cpu")
LIBC = ctypes.CDLL("libc.so.6")


def measure(varied, value, method, work, inputs, floor):
    """A row: the shortest of three runs, and what its memory peaks above the inputs."""
    seconds = []
    for _ in range(3):
        LIBC.malloc_trim(0)  # memory that was freed but kept would hide what is needed
        reset_peak_memory(CPU)
        before, _ = peak_memory(CPU)
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
        peak, _ = peak_memory(CPU)
    return {
        "varied": varied, "value": value, "case": method, "floor (s)": floor,
        "ours (s)": min(seconds), "ours (GB)": (peak - before) / 1e9, "inputs (GB)": inputs / 1e9,
    }  # fmt: skip


def full(varied, value, experts, width, method, rates):
    bandwidth, rate = rates
    shape = (4 * width, width)
    stack = 1e-3 * torch.randn(experts, *shape, generator=torch.Generator().manual_seed(0))
    floor = (stack.nbytes + stack[0].nbytes) / bandwidth
    if method == "optmerge":
        floor += floor_flops(shape, "lora", 300, experts) / rate
    options = OPTIONS.get(method, {})
    return measure(
        varied, value, method, lambda: METHODS[method](stack, **options), stack.nbytes, floor
    )


def factors(rank, experts, width, rates):
    generator, shape = torch.Generator().manual_seed(0), (4 * width, width)
    pairs = [
        (
            torch.randn(shape[0], rank, generator=generator),
            torch.randn(rank, width, generator=generator),
        )
        for _ in range(experts)
    ]
    inputs = sum(b.nbytes + a.nbytes for b, a in pairs)
    flops = 4 * sum(shape) * (experts * rank) ** 2
    options = {"preset": "lora"}
    return measure(
        "rank of adapters", rank, "optmerge",
        lambda: merge_factors(pairs, "optmerge", dict(options), 1.0, shape),
        inputs, 2 * inputs / rates[0] + flops / rates[1],
    )  # fmt: skip


def main(small):
    torch.set_num_threads(1)
    rates = copy_bandwidth(), matmul_rate()
    experts, widths, ranks = (x[:2] if small else x for x in (EXPERTS, WIDTHS, RANKS))
    width, rows = widths[-1] // 4, []
    for method in tqdm(("task_arithmetic", "ties", "optmerge")):
        rows += [full("experts", n, n, width, method, rates) for n in experts]
        rows += [full("width", w, 5, w, method, rates) for w in widths]
    rows += [factors(rank, 5, 4 * width, rates) for rank in ranks]
    if not small:
        table = pd.DataFrame([{"device": device_name()} | row for row in rows])
        target = Path(__file__).with_name("scaling.csv")
        table.to_csv(target, index=False, float_format="%.4g")
    show("scaling", rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a try, which writes nothing")
    main(**vars(parser.parse_args()))
