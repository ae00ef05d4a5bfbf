"""Triton kernels and their launchers: ``attention``, ``rows``, and what they run on.

``attention`` has one file for each kernel of attention and what these share; ``rows`` one for each
family that computes rows by themselves. ``runtime`` launches them: targets, tuned tables, strides.
``compiler`` looks at what they compile to, with no GPU.

Launchers take torch tensors and return torch tensors. They know no autograd, no modules and no
registration; :mod:`fusedformer.ops` adds those.
"""
