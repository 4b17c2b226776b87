"""Iso-C by hand; the reference is in test_registry.py."""

import torch

from optmerge_core.methods.iso_c import iso_c


def test_iso_c_by_hand():
    """Singular values 3 and 1 become 2 and 2."""
    task_vectors = torch.diag_embed(torch.tensor([[1.0, -1.0], [2.0, 0.0]]))
    torch.testing.assert_close(iso_c(task_vectors), torch.diag(torch.tensor([2.0, -2.0])))
