"""What is where in a run folder, what is done and what is stale. No torch."""
