"""Objectives: pure functions from a model's outputs and a batch to ((loss sum, count), scalars to log)."""
