"""The eval harness of dma_hf: what diagonal-tiled mixed-precision attention costs, side by side with SDPA.

In a checkout run it as ``python -m eval``; installed, the package is called ``dma_hf_eval`` and the
command ``dma-eval``. Modules of this package therefore import each other relatively.
"""
