"""From rows of values or codes to chunks of bytes and back: the kernels, their torch reference, and entropy tables."""
