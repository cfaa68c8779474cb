"""Packaging: files and models become a model of the store."""
