"""What models are measured by, and how sure that is."""
