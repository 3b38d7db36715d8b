"""What adapters share: which tensors are quantized, hooks into a host, skipping, recording, converting a site."""
