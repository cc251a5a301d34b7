"""Coefficients <-> codes <-> bytes."""
