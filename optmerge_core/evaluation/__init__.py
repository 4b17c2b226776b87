"""Questions, answers and scores, of embedded and real models."""
