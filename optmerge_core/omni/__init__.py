"""Omni models (Section 5): one language model with the towers of many modalities."""

from optmerge_core.errors import extra

with extra("models"):
    from optmerge_core.omni.compose import compose
    from optmerge_core.omni.model import OmniConfig, OmniForConditionalGeneration

__all__ = ["OmniConfig", "OmniForConditionalGeneration", "compose"]
