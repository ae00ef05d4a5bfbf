"""Attention: ``calls`` chooses the form, ``registered`` has the ops of the kernels.

``aten`` is what ATen computes, ``packed`` the op of it for packed sequences.

``terms`` is what scores depend on, ``chunks`` the torch backend's form of linear memory, ``part``
attention over some of the keys, to be merged. ``disentangled`` is that of DeBERTa, with
``disentangled_aten`` as its ATen form.
"""

from fusedformer.ops.attention.calls import (
    check_for_kernels,
    merge_attention_states,
    scaled_attention,
    scaled_dot_product_attention,
    self_attention,
    varlen_attention,
)
from fusedformer.ops.attention.disentangled import disentangled_attention
from fusedformer.ops.attention.disentangled_aten import Inputs as DisentangledInputs
from fusedformer.ops.attention.disentangled_aten import Settings as DisentangledSettings
from fusedformer.ops.attention.part import attention_part, attention_part_backward, merge_parts
from fusedformer.ops.attention.terms import (
    attention_terms,
    scale_of,
    self_attention_terms,
    window_bounds,
)

__all__ = [
    "DisentangledInputs",
    "DisentangledSettings",
    "attention_part",
    "attention_part_backward",
    "attention_terms",
    "check_for_kernels",
    "disentangled_attention",
    "merge_attention_states",
    "merge_parts",
    "scale_of",
    "scaled_attention",
    "scaled_dot_product_attention",
    "self_attention",
    "self_attention_terms",
    "varlen_attention",
    "window_bounds",
]
