"""Finding backends, what they give back, and the demo model."""
