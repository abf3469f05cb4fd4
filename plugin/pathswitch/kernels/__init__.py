"""Fused kernels: AdamW in one pass with the LR path on the device, and the digest of an optimizer's state."""
