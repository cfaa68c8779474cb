"""What to run: plans for the programs that serve models."""
