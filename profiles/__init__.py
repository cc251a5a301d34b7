"""Profiles that ship with spectralkv."""
