"""Files only: opening, reading and writing checkpoints, wherever they are."""
