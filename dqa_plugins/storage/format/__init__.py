"""The bytes of a packed activation (docs/storage_format.md): what is written, and how it is read and checked.

Knows no torch module and no quantization method. `limits` holds every bound that a reader goes by.
"""
