"""Random models and processors of the real transformers classes."""

from optmerge_core.errors import extra

with extra("benchmark"):  # the files of this room take it for granted
    import transformers  # noqa: F401
