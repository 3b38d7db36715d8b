"""Models that hold their long-lived values as packed bytes: which values those are, and how the graph is changed."""
