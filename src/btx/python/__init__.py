"""What Python programs and notebooks do with a run: the commands as functions, and what they return."""
