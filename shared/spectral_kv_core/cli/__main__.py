"""`python -m spectral_kv_core.cli`: the command `spectralkv`."""

import sys

from .main import main

sys.exit(main())
