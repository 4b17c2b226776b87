"""Every method at the shape of Qwen2-VL-7B with five full experts, on a GPU, compute only.

`python tests/benchmarks/device.py [--methods optmerge ties …] [--device cuda] [--scale 1.0]` makes
one layer's task vectors on the device, merges them, and multiplies by the number of layers, which
are all alike. The floor is reading the stack and writing the result at the measured rate of the
device's memory; for OptMerge and WUDI also the products of its formulas. Of OptMerge it says
whether that is within two minutes and 8 GB.

Before, the Triton kernels are compared with their twins in torch (tests/methods/test_kernels.py);
after, a small merge from disk to disk is traced: while kernels run, how much of the reading into
page-locked memory, and of the copies from there, is done? results.csv keeps all, with the device's
name, where the device is a GPU and the scale 1. Tried at `--device cpu --scale 0.02` where there is
no GPU: the kernels are then interpreted, and the trace has none.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from floors import copy_bandwidth, matmul_rate, record, show
from layer import EXPERTS, INTERNVL_1B, floor_flops, layer_shapes
from models import QWEN2VL_7B, RANK, write_models
from torch.profiler import ProfilerActivity, profile

from optmerge_core import merge
from optmerge_core.methods.registry import METHODS

OPTIONS = {"optmerge": {"preset": "lora"}, "wudi": {"optimizer": "sgd"}}
PRODUCTS = {"optmerge", "wudi"}
SECONDS, GIGABYTES = 120, 8
"""What OptMerge may take for a 7B model: of compute, and of the device's memory."""


def stack_of(shape, device, generator):
    rows, columns = shape
    U = torch.randn(EXPERTS, rows, RANK, device=device, generator=generator)
    V = torch.randn(EXPERTS, RANK, columns, device=device, generator=generator)
    stack = torch.randn(EXPERTS, rows, columns, device=device, generator=generator)
    return stack.mul_(1e-4).add_(U @ V, alpha=1e-3 / RANK**0.5)


def wait(device):
    if device == "cuda":
        torch.cuda.synchronize()


def measure(method, device, scale, rates):
    """A row of the table: one layer's seven matrices, times the number of layers."""
    bandwidth, rate = rates
    layers, seconds, floor = QWEN2VL_7B["layers"], 0.0, 0.0
    generator = torch.Generator(device).manual_seed(0)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    METHODS[method](stack_of((64, 64), device, generator), **OPTIONS.get(method, {}))
    for shape in layer_shapes(QWEN2VL_7B, scale).values():
        stack = stack_of(shape, device, generator)
        wait(device)
        started = time.perf_counter()
        merged = METHODS[method](stack, **OPTIONS.get(method, {}))
        wait(device)
        seconds += time.perf_counter() - started
        floor += (stack.nbytes + merged.nbytes) / bandwidth
        if method in PRODUCTS:
            floor += floor_flops(shape, "lora", 300) / rate
    row = {"case": f"Qwen2-VL-7B, 5 full experts, {method}, compute only, scale {scale:g}"}
    row |= {"floor (s)": layers * floor, "ours (s)": layers * seconds}
    if device == "cuda":
        row["ours (GB)"] = torch.cuda.max_memory_allocated() / 1e9
    return row


def within_limits(row):
    """One line: what OptMerge takes, what it may take, and its share of the floor."""
    kept = row["ours (s)"] <= SECONDS and row.get("ours (GB)", 0) <= GIGABYTES
    return (
        f"{row['case']}: {row['ours (s)']:.1f} s of {SECONDS}, "
        f"{row.get('ours (GB)', float('nan')):.1f} GB of {GIGABYTES}, "
        f"{row['floor (s)'] / row['ours (s)']:.0%} of it the floor: {'kept' if kept else 'MISSED'}"
    )


def check_kernels():
    """Raise an error unless they equal their twins, on the GPU or else interpreted."""
    test = Path(__file__).resolve().parents[1] / "methods" / "test_kernels.py"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", test], capture_output=True, text=True
    )
    if run.returncode:
        raise RuntimeError(run.stdout[-3000:])
    print("The Triton kernels equal their twins in torch.")


def traced_merge(device, scale):
    """The trace's events of a merge by OptMerge from disk to disk, InternVL2.5-1B's shapes."""
    with TemporaryDirectory() as folder:
        base, *experts = (
            Path(folder, name) for name in write_models(Path(folder), INTERNVL_1B, scale)
        )
        every_thread = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
        with profile(activities=activities, experimental_config=every_thread) as profiler:
            merge(base, {x.name: x for x in experts}, Path(folder, "out"), device=device,
                  method_options=OPTIONS["optmerge"])  # fmt: skip
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        return json.loads(trace.read_text())["traceEvents"]


def beside_kernels(events):
    """Of the seconds of reading into pinned memory, and of copies from it, the shares in per cent.

    events: a trace's, in microseconds. None for what the trace does not have.
    """
    spans = {"kernel": [], "reading beside computing (%)": [], "copying beside computing (%)": []}
    for event in events:
        span = event.get("ts"), event.get("ts", 0) + event.get("dur", 0)
        if event.get("cat") == "kernel":
            spans["kernel"].append(span)
        elif event.get("name") in ("aten::pin_memory", "aten::_pin_memory"):
            spans["reading beside computing (%)"].append(span)
        elif event.get("cat") == "gpu_memcpy" and "Pinned -> Device" in event["name"]:
            spans["copying beside computing (%)"].append(span)
    kernels = merged_spans(spans.pop("kernel"))
    shares = {}
    for name, found in spans.items():
        found = merged_spans(found)
        both = sum(
            max(0, min(end, last) - max(start, first))
            for start, end in found
            for first, last in kernels
        )
        total = sum(end - start for start, end in found)
        shares[name] = 100 * both / total if total and kernels else None
    return shares


def merged_spans(spans):
    """The same time in spans that do not overlap."""
    apart = []
    for start, end in sorted(spans):
        if apart and start <= apart[-1][1]:
            apart[-1][1] = max(end, apart[-1][1])
        else:
            apart.append([start, end])
    return apart


def main(methods, device, scale):
    if device == "cuda" and not torch.cuda.is_available():
        print("No GPU is at hand: nothing is measured.")
        return
    check_kernels()
    rates = copy_bandwidth(device=device), matmul_rate(2048, device=device)
    rows = [measure(method, device, scale, rates) for method in methods]
    shares = beside_kernels(traced_merge(device, min(scale, 0.5)))
    for name, share in shares.items():
        print(f"{name}: {'no GPU, not measured' if share is None else f'{share:.0f}'}")
    rows = [row | shares if "optmerge" in row["case"] else row for row in rows]
    if device == "cuda" and scale == 1:
        record(rows)
    for row in rows:
        if "optmerge" in row["case"]:
            print(within_limits(row))
    show("compute only", rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--scale", type=float, default=1.0)
    main(**vars(parser.parse_args()))
