"""Pierhead packages, runs and serves generative models; see README.md."""

__version__ = "0.1.0"
