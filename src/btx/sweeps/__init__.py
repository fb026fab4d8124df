"""Variants of a recipe times rng seeds."""
