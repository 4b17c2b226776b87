"""Merges from disk to disk, at the shapes of real models: seconds, memory, and the floor.

`python tests/benchmarks/models.py [--cases optmerge-1b adapters-7b] [--scale 1.0]
[--folder DIR]` writes random checkpoints (a low-rank signal and noise), merges them, removes them
and prints a table. The floor is reading every input once and writing the result, at
the measured rate of this disk (or page cache), and the products of the formulas at the
measured matmul rate. mergekit_files.py has the methods that mergekit has.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from floors import best_seconds, matmul_rate, record, show
from layer import EXPERTS, INTERNVL_1B, floor_flops, layer_shapes, measure
from safetensors.torch import load_file, save_file

from optmerge_core.checkpoints.writer import CheckpointWriter

RANK = 16
QWEN2VL_7B = {
    "hidden": 3584, "intermediate": 18944, "key_value": 512, "layers": 28, "vocab": 152064,
}  # fmt: skip
HALF_B = INTERNVL_1B | {"layers": 16}  # six files of about 0.75 GB in bfloat16


def linear_shapes(model, scale=1.0):
    """Shape of every linear layer, by its name in the checkpoint."""
    one = layer_shapes(model, scale)
    layers = range(model["layers"] if scale == 1 else 2)
    return {f"model.layers.{i}.{name}": shape for i in layers for name, shape in one.items()}


def write_models(folder, model, scale):
    """base and EXPERTS full checkpoints, bfloat16, in shards of 1 GB; returns their names."""
    names = ["base", *(f"expert{i}" for i in range(EXPERTS))]
    vocabulary = (int(scale * model["vocab"]), int(scale * model["hidden"]))
    for number, name in enumerate(names):
        shared = torch.Generator().manual_seed(0)
        own = torch.Generator().manual_seed(number + 1)
        with CheckpointWriter(folder / name, "1GB") as writer:
            tensor = 0.02 * torch.randn(vocabulary, generator=shared)
            writer.add("model.embed_tokens.weight", tensor.bfloat16())
            for layer, (rows, columns) in linear_shapes(model, scale).items():
                tensor = 0.02 * torch.randn(rows, columns, generator=shared)
                if number:
                    U = torch.randn(rows, RANK, generator=own)
                    V = torch.randn(RANK, columns, generator=own)
                    noise = torch.randn(rows, columns, generator=own)
                    tensor += 1e-3 * (U @ V / RANK**0.5 + 0.1 * noise)
                writer.add(f"{layer}.weight", tensor.bfloat16())
            # No architecture that mergekit has a list of: it then takes the files' own names.
            config = {"model_type": "qwen2", "architectures": ["RandomWeights"]}
            writer.write_text("config.json", json.dumps(config))
    return names


def write_adapters(folder, model, scale):
    for number in range(EXPERTS):
        own, tensors = torch.Generator().manual_seed(number), {}
        for layer, (rows, columns) in linear_shapes(model, scale).items():
            for side, shape in (("A", (RANK, columns)), ("B", (rows, RANK))):
                tensor = 0.02 * torch.randn(shape, generator=own)
                tensors[f"base_model.model.{layer}.lora_{side}.weight"] = tensor.bfloat16()
        target = folder / f"expert{number}"
        target.mkdir()
        save_file(tensors, target / "adapter_model.safetensors")
        config = {
            "peft_type": "LORA",
            "r": RANK,
            "lora_alpha": RANK,
            "target_modules": "all-linear",
        }
        (target / "adapter_config.json").write_text(json.dumps(config))


def bytes_of(*folders):
    return sum(file.stat().st_size for f in folders for file in f.glob("*.safetensors"))


def reading_and_writing(folder, inputs, output):
    """Seconds to read the inputs once and to write a file of the output's size to the disk."""

    def once():
        for name in inputs:
            for file in (folder / name).glob("*.safetensors"):
                for tensor in load_file(file).values():
                    tensor.view(-1).view(torch.uint8).max()
        block = b"\0" * 2**24
        with open(folder / "written", "wb") as stream:
            for _ in range(bytes_of(folder / output) // len(block)):
                stream.write(block)
            stream.flush()
            os.fsync(stream.fileno())
        (folder / "written").unlink()

    return best_seconds(once, repeats=3)


MEASURE = """
import json, sys, time
from pathlib import Path
sys.path.insert(0, {folder!r})
from shares import Shares
shares, started = Shares(), time.perf_counter()
{code}
seconds = time.perf_counter() - started
lines = Path("/proc/self/status").read_text().splitlines()
peak = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
print(json.dumps({{"(s)": seconds, "(GB)": peak / 1e9}} | shares.read()))
"""


def measured(code, *arguments, python=sys.executable):
    """What code takes in a process of its own, imports not counted.

    (s); (GB), the peak of resident memory; and the shares of time that shares.py tells, in (%).
    """
    imports, code = code.split("\n---\n")
    script = imports + MEASURE.format(code=code, folder=str(Path(__file__).parent))
    run = subprocess.run(
        [python, "-c", script, *map(str, arguments)], capture_output=True, text=True
    )
    if run.returncode:
        raise RuntimeError(run.stderr[-2000:])
    return json.loads(run.stdout.splitlines()[-1])


def ours(code, *arguments):
    """The same as columns of the table."""
    found = measured(code, *arguments)
    return {x if "%" in x else f"ours {x}": value for x, value in found.items()}


OURS = """
import sys
from pathlib import Path
from optmerge_core import merge
---
folder = Path(sys.argv[1])
experts = {f.name: f for f in sorted(folder.glob("expert*"))}
merge(folder / "base", experts, folder / "ours", method=sys.argv[2],
      method_options=json.loads(sys.argv[3]), device="cpu", overwrite=True)
"""
ADAPTERS = """
import sys
from pathlib import Path
from optmerge_core import merge_adapters
---
folder = Path(sys.argv[1])
experts = {f.name: f for f in sorted(folder.glob("expert*"))}
merge_adapters(experts, folder / "ours", method="optmerge")
"""


def released_loop(model, rate):
    """The columns of the released code's loop, from `--loop-steps` of one layer (layer.py)."""
    row, *_ = measure(1.0, "lora", 300, 3, rate)
    label = f"{row['other']}, one layer times {model['layers']}"
    return {"other": label, "other (s)": model["layers"] * row["other (s)"]}


def whole_models(case, method, options, model, scale, folder):
    names = write_models(folder, model, scale)
    spent = ours(OURS, folder, method, json.dumps(options))
    floor, rate = reading_and_writing(folder, names, "ours"), matmul_rate()
    shapes = linear_shapes(model, scale).values()
    floor += sum(floor_flops(shape, "lora", 300) for shape in shapes) / rate
    row = {"case": case, "floor (s)": floor} | spent
    return row | (released_loop(model, rate) if scale == 1 else {})


def adapters(case, model, scale, folder):
    write_adapters(folder, model, scale)
    spent = ours(ADAPTERS, folder)
    names = [f"expert{i}" for i in range(EXPERTS)]
    floor = reading_and_writing(folder, names, "ours")
    wide = EXPERTS * RANK
    sides = [side for shape in linear_shapes(model, scale).values() for side in shape]
    floor += sum(4 * side * wide**2 for side in sides) / matmul_rate(dtype=torch.float64)
    return {"case": case, "floor (s)": floor} | spent


CASES = {
    "optmerge-1b": lambda s, f: whole_models(
        "InternVL2.5-1B, 5 experts, OptMerge (lora preset)",
        "optmerge", {"preset": "lora"}, INTERNVL_1B, s, f,
    ),
    "adapters-7b": lambda s, f: adapters(
        "Qwen2-VL-7B, 5 adapters of rank 16 to one, OptMerge", QWEN2VL_7B, s, f
    ),
}  # fmt: skip


def main(cases, scale, folder):
    rows = []
    for case in cases:
        with TemporaryDirectory(dir=folder) as temporary:
            rows.append(CASES[case](scale, Path(temporary)))
    if scale == 1:
        record(rows)
    show("from disk to disk", rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--scale", type=float, default=1.0, help="shrinks every side, for a try")
    parser.add_argument("--folder", help="where the checkpoints are written; 7 GB are needed")
    main(**vars(parser.parse_args()))
