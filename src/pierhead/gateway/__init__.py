"""The data plane: one address for all models, in a process of its own."""
