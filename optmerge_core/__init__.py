"""Merging fine-tuned experts of one multimodal base model (OptMerge, arXiv 2505.19892)."""

from optmerge_core.checkpoints.open import open_checkpoint, open_expert
from optmerge_core.merging.merge import merge
from optmerge_core.merging.merge_adapters import merge_adapters
from optmerge_core.methods.registry import METHODS
from optmerge_core.study.recipe import load_recipe

__version__ = "0.1.0"
__all__ = [
    "METHODS",
    "__version__",
    "load_recipe",
    "merge",
    "merge_adapters",
    "open_checkpoint",
    "open_expert",
]
