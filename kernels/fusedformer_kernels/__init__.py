"""Triton kernels and their launchers: one file per kernel family.

Launchers take torch tensors and return torch tensors. They know no autograd, no modules and no
registration; :mod:`fusedformer.ops` adds those.
"""
