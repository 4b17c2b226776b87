"""How the shipped checkpoints were trained."""
