"""Mixing models into MoE models, and changing those."""
