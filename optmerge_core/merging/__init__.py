"""Where files and formulas meet: what merges, the checks, the merge itself, its report."""
