"""One layer of InternVL2.5-1B, all seven matrices: the published loop and ours, in turns.

`python tests/benchmarks/layer.py [--scale 0.25 1.0] [--steps 300]` prints a table: the floor
(products that cannot be avoided over the measured matmul rate), the loop of the released code
(tests/reference.py in float32), ours, their ratio and their relative difference. The loop takes
minutes at full scale, so there it runs `--loop-steps` steps and is scaled up; the table says so.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from floors import matmul_rate
from rich.console import Console
from rich.table import Table

from optmerge_core.optmerge import optmerge

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import reference  # noqa: E402

HIDDEN, INTERMEDIATE, KEY_VALUE, EXPERTS = 896, 4864, 128, 5
SHAPES = {
    "q_proj": (HIDDEN, HIDDEN),
    "k_proj": (KEY_VALUE, HIDDEN),
    "v_proj": (KEY_VALUE, HIDDEN),
    "o_proj": (HIDDEN, HIDDEN),
    "gate_proj": (INTERMEDIATE, HIDDEN),
    "up_proj": (INTERMEDIATE, HIDDEN),
    "down_proj": (HIDDEN, INTERMEDIATE),
}
LOOPS = {"lora": reference.optmerge_lora, "full": reference.optmerge_full}


def task_vectors(shape, seed, rank=16):
    """A low-rank signal and noise of a tenth of its norm, in the size of a gentle fine-tuning."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape
    U = torch.randn(EXPERTS, rows, rank, generator=generator)
    V = torch.randn(EXPERTS, rank, columns, generator=generator)
    noise = torch.randn(EXPERTS, rows, columns, generator=generator)
    return 1e-3 * (U @ V / rank**0.5 + 0.1 * noise)


def floor_flops(shape, preset, steps):
    """Products only: Gram matrices and their use in the SVDs, C and D, and Adam's steps."""
    rows, columns = shape
    small, large = sorted(shape)
    rank = small // EXPERTS
    decompositions = 1 if preset == "lora" else 2
    svd = decompositions * EXPERTS * 2 * large * small * (small + rank)
    form = EXPERTS * 2 * rank * columns * (2 * rows if preset == "lora" else 2 * rows + columns)
    descent = 4 * rows * columns * min(EXPERTS * rank, columns)
    if preset == "full":
        descent = steps * 2 * rows * columns * columns
    return svd + form + descent


def seconds(work):
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def main(scales, presets, steps, loop_steps):
    rate = matmul_rate()
    table = Table("scale", "preset", "floor (s)", "loop (s)", "ours (s)", "ours / floor",
                  "loop / ours", "difference", title=f"{rate / 1e9:.0f} GFLOP/s")  # fmt: skip
    for scale in scales:
        shapes = {
            name: tuple(int(scale * side) for side in shape) for name, shape in SHAPES.items()
        }
        for preset in presets:
            total = {"floor": 0.0, "loop": 0.0, "ours": 0.0}
            error = energy = 0.0
            few = min(steps, loop_steps) if scale > 0.5 else steps
            for seed, shape in enumerate(shapes.values()):
                tau = task_vectors(shape, seed)
                total["floor"] += floor_flops(shape, preset, steps) / rate
                spent, ours = seconds(lambda t=tau, p=preset: optmerge(t, preset=p, steps=steps))
                total["ours"] += spent
                none, _ = seconds(lambda t=tau, p=preset: LOOPS[p](t, steps=0))
                spent, (loop, _) = seconds(lambda t=tau, p=preset, n=few: LOOPS[p](t, steps=n))
                total["loop"] += none + (spent - none) * steps / few
                if few == steps:
                    error += float((ours - loop).square().sum())
                    energy += float(loop.square().sum())
            difference = f"{(error / energy) ** 0.5:.1e}" if energy else f"{few} steps, scaled"
            table.add_row(
                f"{scale:g}", preset, *(f"{total[k]:.2f}" for k in ("floor", "loop", "ours")),
                f"{total['ours'] / total['floor']:.1f}", f"{total['loop'] / total['ours']:.0f}",
                difference,
            )  # fmt: skip
    Console(width=110).print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scales", nargs="+", type=float, default=[0.25, 1.0])
    parser.add_argument("--presets", nargs="+", choices=list(LOOPS), default=list(LOOPS))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--loop-steps", type=int, default=3)
    main(**vars(parser.parse_args()))
