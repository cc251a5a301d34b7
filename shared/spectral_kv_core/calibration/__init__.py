"""From a model and text to a profile."""
