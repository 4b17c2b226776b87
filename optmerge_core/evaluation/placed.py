"""Where PEFT finds an adapter's modules in a model whose modules have other paths."""

from __future__ import annotations

import re
from typing import Any

from optmerge_core.checkpoints.adapters import parameter_of
from optmerge_core.checkpoints.folder import Checkpoint
from optmerge_core.checkpoints.names import PREFIX
from optmerge_core.checkpoints.weights import as_weights
from optmerge_core.errors import extra

with extra("models"):
    from peft import PeftConfig
    from transformers import PreTrainedModel


def placed(adapter: Checkpoint, model: PreTrainedModel) -> dict[str, Any]:
    """What PEFT must be told where the adapter's modules have other paths than the model's.

    As of an adapter that was made on the text model alone.
    """
    modules = {n.removeprefix(PREFIX).split(".lora_")[0] for n in adapter if ".lora_" in n}
    found = {m: parameter_of(m, as_weights(model)).removesuffix(".weight") for m in modules}
    if all(module == own for module, own in found.items()):
        return {}
    config = PeftConfig.from_pretrained(adapter.folder)
    config.target_modules, config.exclude_modules = [*found.values()], None
    paths = {rf"^{re.escape(module)}\.": f"{own}." for module, own in found.items()}
    return {"config": config, "key_mapping": paths}
