"""A merge, in one process or in parts: `merge` does all that `merge_part` and `join` do."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from optmerge_core.checkpoints.formats import CheckpointError, NotYet, read_json
from optmerge_core.checkpoints.parts import part_file, read_part, remove_parts, write_part
from optmerge_core.checkpoints.writer import CheckpointWriter, check_output
from optmerge_core.merging.card import model_card
from optmerge_core.merging.checks import NothingChanges, check_unchanged
from optmerge_core.merging.loop import Merged, ParameterMerger
from optmerge_core.merging.plan import MergePlan, plan_merge
from optmerge_core.merging.processor import write_side_files
from optmerge_core.merging.report import MergeReport, Record, describe, untied, with_dtype
from optmerge_core.places import worker
from optmerge_core.runtime import Meter, in_order, parse_device

Cost = Callable[[], dict[str, Any]]
SETTINGS = (
    *("method", "method_options", "scaling_coefficient", "trim", "seed"),
    *("dtype", "model_type", "family", "scope", "router", "learnt"),
)
"""What a report says as its plan does."""


def merge(
    base_model: str | Path,
    experts: Mapping[str, Any],
    output_dir: str | Path,
    *,
    method: str = "optmerge",
    method_options: Mapping[str, Any] | None = None,
    scaling_coefficient: float = 1.0,
    device: str = "auto",
    dtype: str | torch.dtype | None = None,
    trim: str = "tensor",
    seed: int = 0,
    overwrite: bool = False,
    family: str | None = None,
    scope: str = "linear",
    router: str = "merge",
    max_shard_size: int | str = "400MB",
    stream: bool = False,
    processor: str | Path | None = None,
    chat_template: str | None = None,
    layers: int | None = None,
    learnt: Mapping[str, Any] | None = None,
) -> MergeReport:
    """Merge fine-tuned experts of one base model into a complete Hugging Face folder.

    The arguments, and what becomes of each parameter, are explained by `plan_merge`. What differs
    between calls with the same inputs is the report alone, which has seconds and bytes of memory.

    Memory: one parameter of all experts with the method's workspace, and two output shards: one is
    written while the next is computed. Inputs are read once while they merge, when NaN and Inf are
    looked for and their files hashed for the report; with `stream` hashes are those the hub tells.

    Raises `ValueError` (`CheckpointError` for files), and nothing is left at `output_dir`.
    """
    meter = Meter(parse_device(device))
    plan = plan_merge(
        base_model, experts, output_dir,
        method=method, method_options=method_options, scaling_coefficient=scaling_coefficient,
        device=device, dtype=dtype, trim=trim, seed=seed, overwrite=overwrite, family=family,
        scope=scope, router=router, max_shard_size=max_shard_size, stream=stream,
        processor=processor, chat_template=chat_template, layers=layers, learnt=learnt,
    )  # fmt: skip
    records: list[Record] = []
    with plan.writer() as writer:
        for name, tensor, made in _results(plan, list(plan.parameters), hashed=True):
            writer.add(name, tensor)
            records += [made] if made else []
        return _finish(plan, writer, records, meter.read)


def merge_part(plan: MergePlan, part: int) -> Path:
    """Merge one part of a plan, `plan.parts[part]`, into its file beside the output.

    By any process that sees the plan's inputs, in any order, as often as one likes: what is
    finished is not done again, what died half-way has left nothing. Returns the file.

    Raises `ValueError` (`CheckpointError` for files, `IndexError` for a part the plan has not). An
    input that cannot be merged (NaN or Inf in it) refuses the merge: all of its parts are removed.
    """
    if not 0 <= part < len(plan.parts):
        raise IndexError(f"part {part}: the plan has parts 0 to {len(plan.parts) - 1}")
    path = part_file(plan.parts_folder, part)
    if path.is_file():
        return path
    expected = plan.parts[part].bytes
    check_output(plan.output_dir, overwrite=plan.overwrite, expected_bytes=expected)
    meter = Meter(parse_device(plan.device))
    tensors, records = {}, []
    try:
        for name, tensor, made in _results(plan, plan.parts[part].names):
            tensors[name] = tensor
            records += [made] if made else []
    except ValueError as error:
        if not isinstance(error, CheckpointError):  # files and networks may do better next time
            remove_parts(plan.parts_folder)
        raise
    notes = {"records": records, "cost": meter.read(), "worker": worker()}
    return write_part(plan.parts_folder, part, tensors, notes)


def join(plan: MergePlan) -> MergeReport:
    """Put the finished parts of a plan together: the output folder appears, whole.

    The same safetensors files and index as `merge` writes, byte for byte. The report's seconds are
    those of all parts and of joining them. The parts are removed; joining what is joined already
    returns its report.

    Raises `NotYet` for parts that are not finished and while others join, and as `merge` does.
    """
    if (done := joined(plan)) is None:
        try:
            done = _join(plan)
        except CheckpointError:  # others may have joined, and removed the parts, in the meantime
            if (done := joined(plan)) is None:
                raise
        except NothingChanges:
            remove_parts(plan.parts_folder)
            raise
    remove_parts(plan.parts_folder)
    return done


def _join(plan: MergePlan) -> MergeReport:
    folder = plan.parts_folder
    missing = [n for n in range(len(plan.parts)) if not part_file(folder, n).is_file()]
    if missing:
        some = ", ".join(map(str, missing[:20])) + ", …" * (len(missing) > 20)
        raise NotYet(
            f"{plan.output_dir}: {len(missing)} of {len(plan.parts)} parts are not merged yet "
            f"({some}); call merge_part(plan, number) for each, then join again"
        )
    meter, costs = Meter(torch.device("cpu")), list[dict[str, Any]]()
    workers: dict[str, list[int]] = {}
    records: list[Record] = []

    def cost() -> dict[str, Any]:
        own = meter.read()
        return own | {
            "plan": plan.key,
            "workers": workers,
            "seconds": math.fsum(x["seconds"] for x in (*costs, own)),
            "device": ", ".join(sorted({x["device"] for x in costs})),
            "peak_memory_bytes": max(x["peak_memory_bytes"] for x in (*costs, own)),
            "peak_device_memory_bytes": max(
                (x["peak_device_memory_bytes"] or 0 for x in costs), default=0
            ) or None,
        }  # fmt: skip

    with plan.writer() as writer:
        for number in tqdm(range(len(plan.parts)), desc="joining", unit="part"):
            tensors, notes = read_part(folder, number, plan.parts[number].names)
            for name, tensor in tensors.items():
                writer.add(name, tensor)
            records += notes["records"]
            costs.append(notes["cost"])
            workers.setdefault(notes["worker"], []).append(number)
        return _finish(plan, writer, records, cost)


def joined(plan: MergePlan) -> MergeReport | None:
    """The report of a plan that has been followed to its end; None of any other."""
    path = Path(plan.output_dir, "merge_report.json")
    if not path.is_file():
        return None
    content = read_json(path)
    return MergeReport(**content) if content.get("plan") == plan.key else None


def _results(plan: MergePlan, names: list[str], hashed: bool = False) -> Iterator[Merged]:
    """The loop over some of a plan's parameters, with its progress."""
    from optmerge_core.checkpoints.remote import streaming  # slow: the hub's client

    opened, parameters = plan.opened(), plan.parameters
    sources = {name: p["merged"] for name, p in parameters.items() if p["merged"]}
    merger = ParameterMerger(
        opened.base,
        opened.experts,
        sources,
        {name: getattr(torch, p["dtype"]) for name, p in parameters.items()},
        method=plan.method,
        options=plan.method_options,
        scaling_coefficient=plan.scaling_coefficient,
        seed=plan.seed,
        device=parse_device(plan.device),
        thresholds=None if plan.thresholds is None else torch.tensor(plan.thresholds),
        hashed=hashed,
    )
    merged = [sources[name] for name in names if name in sources]
    readings = [(opened.base, names), *((x, merged) for x in opened.experts.values())]
    with streaming(readings):
        yield from tqdm(
            merger.results(names),
            desc=f"merging ({plan.method})",
            unit="parameter",
            total=len(names),
        )


def _finish(
    plan: MergePlan, writer: CheckpointWriter, records: list[Record], cost: Cost
) -> MergeReport:
    """Side files, report and card, once all weights are with the writer."""
    opened = plan.opened()
    base = opened.base
    assert base.folder is not None, "only an expert may be in memory"
    norms = {x: [record["expert_norms"][x] for record in records] for x in opened.experts}
    unchanged = [x for x in opened.experts if not any(norms[x])]
    check_unchanged(unchanged, len(norms), len(opened.names))
    writer.flush()
    write_side_files(writer, base.folder, opened.processor)
    config = untied(base.config()) if opened.untied else base.config()
    if plan.dtype is not None:
        config = with_dtype(config, plan.dtype)
    stored = base.folder / "config.json"
    if config != (read_json(stored) if stored.is_file() else {}):
        writer.write_text("config.json", json.dumps(config, indent=2) + "\n")
    inputs = [
        (plan.base_model, base),
        *zip(plan.experts.values(), opened.experts.values(), strict=True),
    ]
    described = list(in_order(lambda pair: describe(pair[0]["location"], pair[1]), inputs))
    report = MergeReport(
        output_dir=plan.output_dir,
        base_model=described[0],
        experts=dict(zip(opened.experts, described[1:], strict=True)),
        parameters=records,
        parameters_kept=len(base) - len(records),
        processor=opened.processor.owner,
        chat_template=opened.processor.template,
        weights=writer.digests(),
        **{name: getattr(plan, name) for name in SETTINGS},
        **cost(),
    )
    writer.write_text("merge_report.json", report.to_json())
    card = model_card(report, base.config(), base.folder, opened.processor.folder)
    writer.write_text("README.md", card)
    return report
