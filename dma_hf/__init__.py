"""Diagonal-tiled mixed-precision attention (DMA) for Hugging Face Transformers.

Importing this package registers `attn_implementation="dma"`:

    import dma_hf
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="dma")
"""

from .attention import diagonal_tiled_attention
from .config import DMAConfig
from .plugin import configure, register
from .policy import DMAFallbackWarning
from .quantization import QuantizedTensor, quantize
from .version import __version__

__all__ = [
    "DMAConfig",
    "DMAFallbackWarning",
    "QuantizedTensor",
    "__version__",
    "configure",
    "diagonal_tiled_attention",
    "quantize",
]

register()
