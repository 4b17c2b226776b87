"""Random models and processors of the real transformers classes."""
