"""Task vectors, parameter by parameter: stacks, tables, spectra."""
