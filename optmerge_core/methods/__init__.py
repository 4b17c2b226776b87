"""Merge methods on tensors only, one file a formula: task vectors in, one out."""
