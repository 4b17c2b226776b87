"""Merging fine-tuned experts of one multimodal base model (OptMerge, arXiv 2505.19892)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optmerge_core.checkpoints.open import open_checkpoint, open_expert
    from optmerge_core.evaluation.check import check_merged
    from optmerge_core.merging.merge import join, merge, merge_part
    from optmerge_core.merging.merge_adapters import merge_adapters
    from optmerge_core.merging.plan import MergePlan, load_plan, plan_merge
    from optmerge_core.methods import TABLE_METHODS
    from optmerge_core.methods.registry import METHODS
    from optmerge_core.methods.svc import svc
    from optmerge_core.study.extract import extract_adapter
    from optmerge_core.study.recipe import load_recipe

_HOMES = {
    "METHODS": "methods.registry",
    "MergePlan": "merging.plan",
    "TABLE_METHODS": "methods",
    "check_merged": "evaluation.check",
    "extract_adapter": "study.extract",
    "join": "merging.merge",
    "load_plan": "merging.plan",
    "load_recipe": "study.recipe",
    "merge": "merging.merge",
    "merge_adapters": "merging.merge_adapters",
    "merge_part": "merging.merge",
    "open_checkpoint": "checkpoints.open",
    "open_expert": "checkpoints.open",
    "plan_merge": "merging.plan",
    "svc": "methods.svc",
}
"""Public name -> its file, imported when the name is first used: torch alone takes two seconds."""

__version__ = "0.1.0"
__all__ = [
    "METHODS",
    "MergePlan",
    "TABLE_METHODS",
    "__version__",
    "check_merged",
    "extract_adapter",
    "join",
    "load_plan",
    "load_recipe",
    "merge",
    "merge_adapters",
    "merge_part",
    "open_checkpoint",
    "open_expert",
    "plan_merge",
    "svc",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
