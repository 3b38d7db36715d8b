"""Example scripts of dqa-plugins, run from the repository root. Nothing below this folder is installed."""
