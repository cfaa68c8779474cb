"""Replicas: their state machine, supervision, claims and eviction."""
