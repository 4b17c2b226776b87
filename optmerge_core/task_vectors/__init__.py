"""Task vectors, parameter by parameter: stacks, tables, spectra, and whether they will merge."""
