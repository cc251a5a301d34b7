"""The command `spectralkv`."""
