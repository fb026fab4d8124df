"""The one training loop, and the stages that are trained by it."""
