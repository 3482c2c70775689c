"""``python -m eval`` (or ``python -m dma_hf_eval``) is ``dma-eval``."""

from __future__ import annotations

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
