"""Pictures, clips and the questions about them."""

from optmerge_core.errors import extra

with extra("benchmark"):  # the files of this room take it for granted
    import datasets  # noqa: F401
    import matplotlib  # noqa: F401
    import PIL  # noqa: F401
