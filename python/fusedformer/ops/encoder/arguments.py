"""What the forward and the backward of an encoder layer hand each other."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class EncoderParameters(NamedTuple):
    """The parameters of a layer, but those of a norm before attention."""

    in_weight: Tensor  # [3E, E], of query, key and value; or [E, E] of the query alone
    in_bias: Tensor | None
    key_weight: Tensor | None  # None where ``in_weight`` is that of all three
    key_bias: Tensor | None
    value_weight: Tensor | None
    value_bias: Tensor | None
    out_weight: Tensor  # [E, E]
    out_bias: Tensor | None
    middle_weight: Tensor | None  # [E], of the norm between attention and feed-forward block
    middle_bias: Tensor | None
    weight1: Tensor  # [F, E]
    bias1: Tensor | None
    weight2: Tensor  # [E, F]
    bias2: Tensor | None
    last_weight: Tensor | None  # [E], of the norm at the end
    last_bias: Tensor | None


# Parameters that products read; the kernels take the others as they are.
OF_PRODUCTS = (*EncoderParameters._fields[:7], "weight1", "weight2")


class EncoderSettings(NamedTuple):
    """What a layer computes with them; probabilities of dropout are 0 where it does not train."""

    heads: int
    activation: str  # a name that ``bias_activation`` knows
    middle_eps: float
    last_eps: float | None  # None: the last sum is left to the norm of the next layer
    hidden_p: float  # behind the activation
    middle_p: float  # of what attention adds
    last_p: float  # of what the feed-forward block adds
    checkpoint_activation: bool


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


class Needs(NamedTuple):
    """Which gradients are asked for."""

    x: bool
    residual: bool
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
