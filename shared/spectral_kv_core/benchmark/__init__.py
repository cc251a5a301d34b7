"""What `spectralkv bench` and `spectralkv fit` measure and count."""
