"""The live cache: exact sinks, sealed chunks, an exact window; and its file."""
