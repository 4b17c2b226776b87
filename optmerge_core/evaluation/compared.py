"""The adapters that a folder was merged from, applied to the base by PEFT, beside its logits."""

import re
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from optmerge_core.checkpoints import URL
from optmerge_core.checkpoints.open import open_checkpoint, open_expert
from optmerge_core.errors import extra
from optmerge_core.merging.checks import with_preset
from optmerge_core.merging.merge_adapters import merge_adapters
from optmerge_core.merging.report import pinned
from optmerge_core.merging.spaces import check_possible

with extra("models"):
    from peft import PeftModel

    from optmerge_core.evaluation.placed import placed

ADAPTER = re.compile("adapter_model")
TOLERANCE = 4, 1e-3
"""Of the difference to the adapters: times what rounding does, and of what they change at all. Both
round the same weights, but where float32 falls on either side; iterations end 1e-4 apart."""


def language_part(model):
    """What takes a prompt and has logits: the model, or of one that also speaks its thinker."""
    return getattr(model, "thinker", model)


def compare(check, report, kind, inputs, logits):
    """The adapters that were merged, as one adapter on the base, beside the folder's logits.

    Only where all experts are adapters. Raises `ValueError` where that has no such adapter.
    """
    experts = report.get("experts", {})
    if not experts or not all(any(map(ADAPTER.match, x["sha256"])) for x in experts.values()):
        return
    places = {name: pinned(item) for name, item in experts.items()}
    if streamed := [x for x in (*places.values(), pinned(report["base_model"])) if URL.match(x)]:
        raise ValueError(f"{streamed[0]} was streamed, and is not read again")
    method = report["method"]
    options = with_preset(method, report["method_options"], "full")
    check_possible(method, options)
    base = open_checkpoint(pinned(report["base_model"]))
    merged = {record["name"] for record in report["parameters"]}
    for name, place in places.items():
        if outside := sorted(set(open_expert(place, base).changes or ()) - merged):
            raise ValueError(f"expert {name} adapts what did not merge ({outside[0]})")
    with TemporaryDirectory() as folder:
        adapter = merge_adapters(
            places, Path(folder, "adapter"), method=method, method_options=options,
            scaling_coefficient=report["scaling_coefficient"], base_model=base.folder,
        )  # fmt: skip
        applied, plain, rounded = _applied(adapter, base.folder, kind, check.dtype, inputs)
    difference, rounding, change = (
        float((x - applied).norm() / applied.norm()) for x in (logits, rounded, plain)
    )
    check.adapter_difference, check.adapter_rounding = difference, rounding
    if not difference <= TOLERANCE[0] * rounding + TOLERANCE[1] * change:
        check.failed.append(
            f"the adapters on the base give other logits than the folder ({difference:.1e} of "
            f"their norm; rounding makes {rounding:.1e}), probably since PEFT reads their alpha, "
            "rank or modules otherwise: compare with merge_and_unload() of each"
        )


def _applied(adapter, base_folder, kind, dtype, inputs):
    """Logits on the CPU: of base and adapter, of the base, of the base with the adapter merged."""
    model = kind.from_pretrained(base_folder, dtype=getattr(torch, dtype)).eval()
    model = model.to(inputs["input_ids"].device)
    asked = language_part(model)  # in which PEFT puts the adapter's layers
    paths = placed(open_checkpoint(adapter, adapter=True), model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")
        adapted = PeftModel.from_pretrained(model, adapter, **paths)

    def logits():
        return asked(**inputs).logits[0].float().cpu()

    applied = logits()
    with adapted.disable_adapter():
        plain = logits()
    adapted.merge_and_unload()
    return applied, plain, logits()
