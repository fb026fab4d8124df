"""Models that answer: completions and chat."""
