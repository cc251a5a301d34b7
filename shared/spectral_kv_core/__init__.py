"""The backend-neutral core of spectralkv: profile format, plan, codec and reference attention."""

__version__ = "0.1.0"
