"""Facts about networks that placement, storage and ranking share: operations, names, axes, aliases, readers.

Nothing here knows a quantizer or a host framework.
"""
