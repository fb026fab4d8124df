"""Copies of metrics.jsonl in the tools that people watch trainings with, one file each."""
