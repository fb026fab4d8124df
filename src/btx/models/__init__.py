"""Models in memory: loading and saving, what they cost, what trains, what they say."""
