"""Longer experiments, whose tables ship with the benchmark."""
