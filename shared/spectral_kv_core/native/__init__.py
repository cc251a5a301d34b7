"""C kernels of the core, and the loader that a backend's kernels take too."""

from .loader import disabled, library, load

__all__ = ["disabled", "library", "load"]
