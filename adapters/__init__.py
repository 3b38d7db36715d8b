"""Adapters: one room per framework, built alike. Installed as `dqa_plugins.adapters`.

Each room holds glue only and has the same files with the same roles: `config` (a method in the framework's own
configuration), `observer` (the framework's observer around an ActivationQuantizer), `place` (which tensors get one,
and under which name), `convert` (what becomes of it), `hooks` (what of the framework is touched, checked at import).
Nothing of a framework is imported before its room is.
"""
