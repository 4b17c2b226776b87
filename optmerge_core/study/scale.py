"""What merging a large model takes on how many workers, computed: parts, bytes, hours.

Parts and who merges them are those of a plan. What a part takes is estimated: its singular value
decompositions, by min²·max, and the bytes that it reads, each at a rate that was measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import pandas as pd

from optmerge_core.checkpoints.names import is_stack
from optmerge_core.merging.loop import memory
from optmerge_core.merging.plan import Part, Planned, parts_of
from optmerge_core.study.shares import shared_out

EXPERTS = 5
MAX_PART_SIZE = 256_000_000
BFLOAT16 = 2


@dataclass(frozen=True)
class Model:
    """The shapes of a language model, in bfloat16; towers, biases and norms are small beside it."""

    layers: int
    hidden: int
    mlp: int
    keys: int
    """and values: heads times their width"""
    vocabulary: int
    queries: int = 0
    """hidden where it is 0"""
    experts: int = 0
    """of a mixture, each with an MLP of its own, all of a layer in two tensors"""

    def layer(self) -> dict[str, tuple[int, ...]]:
        """The parameters of a layer that merge: name -> shape."""
        hidden, mlp, queries = self.hidden, self.mlp, self.queries or self.hidden
        attention: dict[str, tuple[int, ...]] = {
            "self_attn.q_proj.weight": (queries, hidden),
            "self_attn.k_proj.weight": (self.keys, hidden),
            "self_attn.v_proj.weight": (self.keys, hidden),
            "self_attn.o_proj.weight": (hidden, queries),
        }
        if self.experts:
            return attention | {
                "mlp.gate.weight": (self.experts, hidden),
                "mlp.experts.gate_up_proj": (self.experts, 2 * mlp, hidden),
                "mlp.experts.down_proj": (self.experts, hidden, mlp),
            }
        return attention | {
            "mlp.gate_proj.weight": (mlp, hidden),
            "mlp.up_proj.weight": (mlp, hidden),
            "mlp.down_proj.weight": (hidden, mlp),
        }

    @cached_property
    def parameters(self) -> dict[str, Planned]:
        """All of them, as a plan has them."""
        found = {}
        for number in range(self.layers):
            for name, shape in self.layer().items():
                found[f"model.layers.{number}.{name}"] = shape
        planned = {
            name: Planned(shape=list(shape), dtype="bfloat16", merged=name)
            for name, shape in found.items()
        }
        ends = [self.vocabulary, self.hidden]
        kept = Planned(shape=ends, dtype="bfloat16", merged=None)
        return {"model.embed_tokens.weight": kept} | planned | {"lm_head.weight": kept}

    @cached_property
    def parts(self) -> list[Part]:
        """Of its merge, as `plan_merge` cuts it."""
        sizes = {name: BFLOAT16 * math.prod(x["shape"]) for name, x in self.parameters.items()}
        return parts_of(self.parameters, sizes, MAX_PART_SIZE)

    @property
    def bytes(self) -> int:
        """Of base, expert or merged model."""
        return sum(part.bytes for part in self.parts)

    def read(self) -> int:
        """Bytes that all parts read."""
        return sum(bytes_read(self.parameters, part) for part in self.parts)

    def memory(self) -> int:
        """Bytes that the largest part takes at most."""
        shapes = {name: x["shape"] for name, x in self.parameters.items() if x["merged"]}
        most = max(memory(x[is_stack(name, x) :], EXPERTS) for name, x in shapes.items())
        return most + max(part.bytes for part in self.parts)


def bytes_read(parameters: Mapping[str, Planned], part: Part) -> int:
    """By a part of a plan, in bfloat16: of the base all, of the experts what merges."""
    merged = [x["shape"] for name in part.names if (x := parameters[name])["merged"]]
    return part.bytes + EXPERTS * BFLOAT16 * sum(map(math.prod, merged))


MODELS = {
    "InternVL2.5-1B": Model(24, 896, 4864, 128, 151674),
    "Qwen2-VL-7B": Model(28, 3584, 18944, 512, 152064),
    "Qwen2.5-VL-32B": Model(64, 5120, 27648, 1024, 152064),
    "Qwen2.5-VL-72B": Model(80, 8192, 29568, 1024, 152064),
    "Qwen3-VL-235B-A22B": Model(94, 4096, 1536, 512, 151936, queries=8192, experts=128),
}
"""By the config.json that each publishes: num_hidden_layers, hidden_size, intermediate_size
(moe_intermediate_size), num_key_value_heads and num_attention_heads times head_dim, vocab_size,
num_experts. The names in the paper, and the next larger of their makers."""


@dataclass(frozen=True)
class Rates:
    """Seconds of one core."""

    cost: float
    """for each unit of min²·max, of OptMerge with five experts"""
    byte: float
    """for each byte that is read, checked, added and written"""

    @classmethod
    def measured(cls, scaling: pd.DataFrame, results: pd.DataFrame) -> Rates:
        """From scaling.csv, one matrix on one thread; results.csv, six models on two threads."""
        disk = results[results["case"] == ON_DISK].iloc[-1]
        read = (EXPERTS + 1) * BFLOAT16 * DISK_PARAMETERS
        return cls(cost=seconds_a_cost(scaling), byte=float(2 * disk["ours (s)"] / read))

    def seconds(self, cost: float, read: float) -> float:
        return self.cost * cost + self.byte * read


ON_DISK = "six 0.75 GB models, Task Arithmetic, own recipe"
DISK_PARAMETERS = 374_450_944
"""Of each of those models."""


def seconds_a_cost(scaling: pd.DataFrame) -> float:
    """Of the largest matrix that was measured, (4 · width, width), for each unit of min²·max."""
    wide = scaling.query("varied == 'width' and case == 'optmerge'").iloc[-1]
    return float(wide["ours (s)"] / (4 * wide["value"] ** 3))


def hours(model: Model, workers: int, rates: Rates) -> float:
    """From the first part to the joined folder: what the busiest worker does, then the join."""
    parts = model.parts
    work = [rates.seconds(part.cost, bytes_read(model.parameters, part)) for part in parts]
    longest = max(sum(work[n] for n in own) for own in shared_out(work, workers))
    return (longest + rates.seconds(0, model.bytes)) / 3600


def table(models: Mapping[str, Model], rates: Rates, workers: tuple[int, ...]) -> pd.DataFrame:
    """A row a model: parts, bytes, memory, hours."""
    rows = {}
    for name, model in models.items():
        rows[name] = {
            "parts": len(model.parts),
            "read (GB)": model.read() / 1e9,
            "written (GB)": model.bytes / 1e9,
            "memory of a worker (GB)": model.memory() / 1e9,
        } | {f"hours, {n}": hours(model, n, rates) for n in workers}
    return pd.DataFrame(rows).T.rename_axis("model")
