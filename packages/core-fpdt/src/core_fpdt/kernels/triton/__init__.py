"""Own kernels for what fused attention does not take: masks, softcaps, and the merge in one pass."""
