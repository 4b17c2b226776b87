"""How the shipped checkpoints were trained."""

from optmerge_core.errors import extra

with extra("benchmark"):  # the files of this room take it for granted
    import peft  # noqa: F401
    import transformers  # noqa: F401
