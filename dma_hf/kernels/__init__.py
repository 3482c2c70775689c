"""The Triton kernels: one fused quantiser, one attention kernel, and the helpers they share."""
