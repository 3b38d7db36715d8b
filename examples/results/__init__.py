"""Every measured figure of the pages comes from a JSON in docs/results: `python -m examples.results`."""
