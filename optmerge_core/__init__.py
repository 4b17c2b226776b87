"""Merging fine-tuned experts of one multimodal base model (OptMerge, arXiv 2505.19892)."""

from optmerge_core.adapters import open_expert
from optmerge_core.checkpoints import open_checkpoint
from optmerge_core.merge import merge
from optmerge_core.merge_adapters import merge_adapters
from optmerge_core.methods import METHODS
from optmerge_core.recipe import load_recipe

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
