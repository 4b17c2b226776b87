"""One recipe, and what is done with it."""
