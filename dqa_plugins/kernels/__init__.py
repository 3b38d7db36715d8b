"""Compiled CPU kernels (numba). Nothing here is imported until a kernel is needed: importing numba takes a while."""
