"""The benchmark's model families: random models and processors of the real transformers classes."""

from optmerge_core.benchmark.models import internvl, qwen2vl
from optmerge_core.benchmark.models.family import Prompts, stop_at_the_end

EMBEDDED_FAMILIES = {"internvl": internvl, "qwen2_vl": qwen2vl}
"""config.json's `model_type` -> module with `build_processor` and `build_model`."""
PROCESSORS = [kind.__name__ for kind in Prompts.__subclasses__()]
"""Names of their processors' classes, by which their folders are known."""


def build_processor(family="internvl"):
    """A family's processor: tokenizer, image processor and chat template."""
    return EMBEDDED_FAMILIES[family].build_processor()


def build_model(processor, family="internvl", seed=0, **size):
    """A family's model with random weights that the seed decides; generation stops at the end."""
    tokenizer = processor.tokenizer
    model = EMBEDDED_FAMILIES[family].build_model(tokenizer, seed, **size)
    return stop_at_the_end(model, tokenizer)
