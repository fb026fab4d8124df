"""Runs: the graph of stages, the run folder, the processes that work on it."""
