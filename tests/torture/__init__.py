"""An adversarial suite: every case ends in the right result, or in a typed error that names layer, value and way out.

python -m tests.torture --seconds 30 runs it for as long as it is told; docs/reliability.md says what it has found.
"""
