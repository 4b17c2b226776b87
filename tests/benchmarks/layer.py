"""One layer of InternVL2.5-1B, all seven matrices: the published loop and ours, in turns.

`python tests/benchmarks/layer.py [--scales 0.25 1.0] [--steps 300]` prints a table: the floor (the
products of the formulas as they stand, at the measured matmul rate), the loop of the released code
(tests/reference.py in float32), ours (the matrices in parallel, as `merge` does), their ratio and
their relative difference. The released code multiplies (m, n) by (n, m) for every expert and step
("m rows"); of the second factor's rows only k are not 0, and a loop that leaves the others out
("k rows") is compared too. The loops take minutes at full scale, so there they run `--loop-steps`
steps and are scaled up; the table says so. results.csv keeps what was measured.
"""

import argparse
import sys
import time
from itertools import product
from pathlib import Path

import torch
from floors import matmul_rate, record, show

from optmerge_core.methods.optmerge import optmerge
from optmerge_core.runtime import in_order

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import reference  # noqa: E402

EXPERTS = 5
INTERNVL_1B = {"hidden": 896, "intermediate": 4864, "key_value": 128, "layers": 24, "vocab": 151674}
LOOPS = {"lora": reference.optmerge_lora, "full": reference.optmerge_full}


def layer_shapes(model, scale=1.0):
    """Shape of every linear layer of one transformer layer, by its name in the checkpoint."""
    hidden, inner, kv = (int(scale * model[k]) for k in ("hidden", "intermediate", "key_value"))
    return {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }


def task_vectors(shape, seed, rank=16):
    """A low-rank signal and noise of a tenth of its norm, in the size of a gentle fine-tuning."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape
    U = torch.randn(EXPERTS, rows, rank, generator=generator)
    V = torch.randn(EXPERTS, rank, columns, generator=generator)
    noise = torch.randn(EXPERTS, rows, columns, generator=generator)
    return 1e-3 * (U @ V / rank**0.5 + 0.1 * noise)


def floor_flops(shape, preset, steps, experts=EXPERTS):
    """Products of the formulas as they stand: Gram matrices, their use in SVDs, C and D, steps.

    As if all were whole, in float32 and each needed: a yardstick that stays the same between
    versions. Half of a symmetric product, and truncated targets, can be spared.
    """
    rows, columns = shape
    small, large = sorted(shape)
    rank = small // experts
    decompositions = 1 if preset == "lora" else 2
    svd = decompositions * experts * 2 * large * small * (small + rank)
    form = experts * 2 * rank * columns * (2 * rows if preset == "lora" else 2 * rows + columns)
    descent = 4 * rows * columns * min(experts * rank, columns)
    if preset == "full":
        descent = steps * 2 * rows * columns * min(columns, 2 * experts * rank)
    return svd + form + descent


def seconds(work):
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def measure(scale, preset, steps, loop_steps, rate):
    """Two rows of the table: the layer's matrices merged by ours, beside either loop.

    The longest first: in a model of many layers no core waits for the last matrix of each.
    """
    shapes = list(layer_shapes(INTERNVL_1B, scale).values())
    shapes.sort(key=lambda shape: floor_flops(shape, preset, steps), reverse=True)
    stacks = [task_vectors(shape, seed) for seed, shape in enumerate(shapes)]
    few = min(steps, loop_steps) if scale > 0.5 else steps

    def ours(stack):
        return optmerge(stack, preset=preset, steps=steps)

    def loop(count, pad):
        return [LOOPS[preset](stack, steps=count, pad=pad)[0] for stack in stacks]

    list(in_order(ours, stacks[:2]))  # the first call of a library is slow
    rows = []
    for label, pad in (("m rows", True), ("k rows", False)):
        spent, merged = seconds(lambda: list(in_order(ours, stacks)))
        none, _ = seconds(lambda pad=pad: loop(0, pad))
        descent, expected = seconds(lambda pad=pad: loop(few, pad))
        name = f"one layer of InternVL2.5-1B, scale {scale:g}, {preset} preset, {label}"
        row = {
            "case": name,
            "floor (s)": sum(floor_flops(shape, preset, steps) for shape in shapes) / rate,
            "ours (s)": spent,
            "other": "plain loop" if few == steps else f"plain loop, {few} steps, scaled up",
            "other (s)": none + (descent - none) * steps / few,
        }
        if few == steps:
            errors = sum((x - y).square().sum() for x, y in zip(merged, expected, strict=True))
            row["difference"] = float((errors / sum(x.square().sum() for x in expected)).sqrt())
        rows.append(row)
    return rows


def main(scales, presets, steps, loop_steps):
    rate = matmul_rate()
    cases = product(scales, presets)
    rows = [row for case in cases for row in measure(*case, steps, loop_steps, rate)]
    if steps == 300:
        record(rows)
    show("one layer", rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scales", nargs="+", type=float, default=[0.25, 1.0])
    parser.add_argument("--presets", nargs="+", choices=list(LOOPS), default=list(LOOPS))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--loop-steps", type=int, default=3)
    main(**vars(parser.parse_args()))
