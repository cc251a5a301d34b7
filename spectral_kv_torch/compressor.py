"""Codes of one head's keys or values on PyTorch."""

from __future__ import annotations

from spectral_kv_core.compat.compressor import Compressor

from . import ops


class SpectralKVCompressor(Compressor):
    __doc__ = f"""{Compressor.__doc__}
    Examples:
        >>> from spectral_kv_core.hosts.demo_model import demo_model_path
        >>> from spectral_kv_core.profile.store import packaged_profiles
        >>> from spectral_kv_torch import SpectralKVCompressor, SpectralProfile, capture, load_model
        >>> model, tokenizer = load_model(demo_model_path())
        >>> layer = capture(model, tokenizer.encode("The sea is a place of endless wonder.")).layers[8]
        >>> projection = SpectralProfile.load(packaged_profiles()[0]).get_projection(layer=8, head=0)
        >>> compressor = SpectralKVCompressor(projection, bits=4)
        >>> compressed = compressor.compress(layer.keys[0, 0])  # [tokens, head_dim]
        >>> tuple(compressor.decompress(compressed).shape)
        (9, 64)
    """

    xp = ops
