"""The names of the first library, spectral-kv 1.0."""
