"""Array mathematics: written once, for NumPy and for every backend."""
