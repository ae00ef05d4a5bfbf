"""What the forward and the backward of a layer hand each other."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class EncoderParameters(NamedTuple):
    """The parameters of a layer, and the tables of rotary embedding.

    Those of attention to a memory are a decoder's; keys and values of it are one product.
    """

    in_weight: Tensor  # [3E, E], of query, key and value; or [E, E] of the query alone
    in_bias: Tensor | None
    key_weight: Tensor | None  # None where ``in_weight`` is that of all three
    key_bias: Tensor | None
    value_weight: Tensor | None
    value_bias: Tensor | None
    out_weight: Tensor  # [E, E]
    out_bias: Tensor | None
    middle_weight: Tensor | None  # [E], of the norm behind self-attention's sum
    middle_bias: Tensor | None
    weight1: Tensor  # [F, E]; [2F, E] of a gated activation, which has no bias
    bias1: Tensor | None
    weight2: Tensor  # [E, F]
    bias2: Tensor | None
    last_weight: Tensor | None  # [E], of the norm at the end
    last_bias: Tensor | None
    first_weight: Tensor | None = None  # [E], of the norm before attention
    first_bias: Tensor | None = None
    cos: Tensor | None = None  # [1 or batch, length, head_dim], of rotary embedding
    sin: Tensor | None = None
    cross_weight: Tensor | None = None  # [3E, E], of query, and of the memory's key and value
    cross_bias: Tensor | None = None
    cross_out_weight: Tensor | None = None  # [E, E]
    cross_out_bias: Tensor | None = None
    cross_norm_weight: Tensor | None = None  # [E], of the norm before the feed-forward block
    cross_norm_bias: Tensor | None = None


# Parameters that products read; the kernels take the others as they are.
OF_PRODUCTS = (
    *EncoderParameters._fields[:7], "weight1", "weight2", "cross_weight", "cross_bias",
    "cross_out_weight",
)  # fmt: skip


class EncoderSettings(NamedTuple):
    """What a layer computes with them; probabilities of dropout are 0 where it does not train."""

    heads: int
    activation: str  # a name that ``bias_activation`` knows
    middle_eps: float
    last_eps: float | None  # None: no norm at the end
    hidden_p: float  # behind the activation
    middle_p: float  # of what attention adds
    last_p: float  # of what the feed-forward block adds
    checkpoint_activation: bool
    first_eps: float | None = None  # None: no norm before attention, or it is computed already
    adds_last: bool = False  # without a norm at the end: the last sum is not left to the next layer
    is_gated: bool = False
    norm: str = "layer"  # or "rms"
    cross_eps: float = 0.0
    cross_p: float = 0.0  # of what attention to the memory adds


class Kept(NamedTuple):
    """What a backward reads of what the forward has computed."""

    source: Tensor | None  # of attention, in the dtype of its product
    projected: Tensor  # query, key and value, or the query
    key: Tensor | None
    value: Tensor | None
    merged: Tensor
    statistics: Tensor
    sum1: Tensor | None
    mean1: Tensor | None
    rstd1: Tensor | None
    middle: Tensor | None  # of the feed-forward block
    before: Tensor  # its activation
    hidden: Tensor | None  # behind it
    sum2: Tensor | None
    mean2: Tensor | None
    rstd2: Tensor | None
    seed: Tensor | None  # of attention
    seed1: Tensor | None
    hidden_seed: Tensor | None
    seed2: Tensor | None
    x: Tensor | None = None  # which the first norm read
    mean0: Tensor | None = None
    rstd0: Tensor | None = None
    asking: Tensor | None = None  # what attends to the memory, in the dtype of its product
    memory: Tensor | None = None  # likewise
    query: Tensor | None = None  # of the memory
    pair: Tensor | None = None  # key and value of the memory
    cross_merged: Tensor | None = None
    cross_statistics: Tensor | None = None
    cross_sum: Tensor | None = None
    cross_mean: Tensor | None = None
    cross_rstd: Tensor | None = None
    cross_seed: Tensor | None = None  # of attention
    cross_seed1: Tensor | None = None


class Needs(NamedTuple):
    """Which gradients are asked for."""

    x: bool
    residual: bool
    memory: bool
    in_weight: bool
    in_bias: bool
    key_weight: bool
    key_bias: bool
    value_weight: bool
    value_bias: bool
    out_weight: bool
    out_bias: bool
    middle_weight: bool
    middle_bias: bool
    weight1: bool
    bias1: bool
    weight2: bool
    bias2: bool
    last_weight: bool
    last_bias: bool
    first_weight: bool
    first_bias: bool
    cos: bool  # never, as of sin
    sin: bool
    cross_weight: bool
    cross_bias: bool
    cross_out_weight: bool
    cross_out_bias: bool
    cross_norm_weight: bool
    cross_norm_bias: bool
