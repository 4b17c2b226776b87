"""Every method at the shape of Qwen2-VL-7B with five full experts, on a GPU, compute only.

`python tests/benchmarks/device.py [--methods optmerge ties …] [--device cuda] [--scale 1.0]` makes
one layer's task vectors on the device, merges them, and multiplies by the number of layers, which
are all alike. The floor is reading the stack and writing the result at the measured rate of the
device's memory; for OptMerge and WUDI also the products that cannot be avoided. Tried at
`--device cpu --scale 0.02` where there is no GPU.
"""

import argparse
import time

import torch
from floors import copy_bandwidth, matmul_rate, record, show
from layer import EXPERTS, floor_flops, layer_shapes
from models import QWEN2VL_7B, RANK

from optmerge_core.methods.registry import METHODS

OPTIONS = {"optmerge": {"preset": "lora"}, "wudi": {"optimizer": "sgd"}}
PRODUCTS = {"optmerge", "wudi"}


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


def main(methods, device, scale):
    rates = copy_bandwidth(device=device), matmul_rate(2048, device=device)
    rows = [measure(method, device, scale, rates) for method in methods]
    if device == "cuda" and scale == 1:
        record(rows)
    show("compute only", rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--scale", type=float, default=1.0)
    main(**vars(parser.parse_args()))
