"""The control plane: composition root, life cycle, control API and its client."""
