"""Measures how a model is served: plans, a load generator, figures and their comparison; prints nothing."""
