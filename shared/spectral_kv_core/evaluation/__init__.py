"""What `spectralkv eval` feeds, measures and keeps."""
