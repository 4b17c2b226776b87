"""What a merge leaves behind besides weights: its report, its model card, what it cost."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

_CARD = """---
library_name: transformers
tags: [merge, optmerge]{base_models}
---

# Merged model

{count} experts merged into one model by `{method}` with
[optmerge_core](https://arxiv.org/abs/2505.19892): {merged} weight matrices of the language model
are merged, {kept} other parameters are the base model's. Details and hashes of all inputs are in
`merge_report.json`.

## Recipe

```yaml
{recipe}```

## Load

```python
from transformers import AutoProcessor, {model_class}

model = {model_class}.from_pretrained("path/to/this/folder")
processor = AutoProcessor.from_pretrained("path/to/this/folder")
```
"""


@dataclass(frozen=True)
class MergeReport:
    """What a merge read, did and cost; `merge_report.json` holds the same."""

    output_dir: str
    method: str
    method_options: dict[str, Any]
    scaling_coefficient: float
    trim: str
    seed: int
    device: str
    dtype: str | None
    model_type: str | None
    base_model: dict[str, Any]
    """location, revision (hub commit or None), sha256 of each weight file"""
    experts: dict[str, dict[str, Any]]
    """the same for each expert"""
    parameters: list[dict[str, Any]]
    """for each merged parameter: name, shape, merged_norm (Frobenius), expert_norms"""
    parameters_kept: int
    seconds: float
    """from the call to the report, with all checks and hashes"""
    peak_memory_bytes: int
    """of the whole process, resident, while it merged"""
    peak_device_memory_bytes: int | None
    """allocated by torch on the CUDA device; None on the CPU"""
    versions: dict[str, str]

    def to_json(self) -> str:
        """Indented JSON of all fields; what JSON has no word for is written as text."""
        return json.dumps(asdict(self), indent=2, default=str) + "\n"

    def model_card(self, config: dict) -> str:
        """README.md: the recipe that makes this model again, its inputs, how to load it."""
        recipe = {
            "merge_method": self.method,
            "base_model": self.base_model["location"],
            "models": [
                {"model": expert["location"], "name": name} for name, expert in self.experts.items()
            ],
            "parameters": {"lambda": self.scaling_coefficient},
            "method_options": {self.method: self.method_options},
            "trim": self.trim,
            "seed": self.seed,
        }
        if self.dtype:
            recipe["dtype"] = self.dtype
        inputs = [self.base_model, *self.experts.values()]
        hub_ids = [item["location"] for item in inputs if item["revision"] is not None]
        return _CARD.format(
            base_models=f"\nbase_model: {json.dumps(hub_ids)}" if hub_ids else "",
            count=len(self.experts),
            method=self.method,
            merged=len(self.parameters),
            kept=self.parameters_kept,
            recipe=yaml.safe_dump(json.loads(json.dumps(recipe, default=str)), sort_keys=False),
            model_class=(config.get("architectures") or ["AutoModel"])[0],
        )


def reset_peak_memory(device: torch.device) -> None:
    """Start a new measurement of `peak_memory`, where the system lets a process do so (Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass  # then the peak is that of the whole process so far


def peak_memory(device: torch.device) -> tuple[int, int | None]:
    """Peak resident bytes of this process, and peak bytes allocated on a CUDA device (or None)."""
    on_device = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024, on_device
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, on_device  # macOS counts bytes
