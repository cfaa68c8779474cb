"""Readers of model file headers and memory estimates."""
