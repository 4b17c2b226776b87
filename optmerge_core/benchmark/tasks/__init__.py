"""Pictures, clips and the questions about them."""
