"""The backward of a layer, from the gradient of its output to those that are asked for."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedformer._internal.tracing import may_be_batched
from fusedformer.ops._shared import common_dtype
from fusedformer.ops.encoder.arguments import EncoderParameters, Kept, Needs
from fusedformer.ops.encoder.forward import (
    NO_NORMS,
    Call,
    activated,
    cross_projections,
    half_tables,
    heads_of,
    projections,
    queries_and_keys,
)
from fusedformer.ops.encoder.launchers import by_dispatcher, launchers
from fusedformer.ops.encoder.steps import (
    added,
    bias_gradient,
    in_dtype,
    input_gradient,
    joined,
    weight_gradient,
)

_NAMES = "in", "key", "value"


class Backward:
    """Computes the gradients of one call, block by block from the last."""

    def __init__(
        self, kept: Kept, own: EncoderParameters, call: Call, needs: Needs, is_apart: bool
    ) -> None:
        """Take what the forward had; ``is_apart`` where the residual is not its input."""
        self.kept, self.own, self.call, self.needs = kept, own, call, needs
        self.is_apart = is_apart
        self.run = by_dispatcher() if may_be_batched() else launchers()
        self.found: dict[str, Tensor | None] = dict.fromkeys(Needs._fields)

    def gradients(
        self, grad: Tensor, sum_grad: Tensor | None, memory_grad: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Compute those of ``x``, ``residual``, ``memory``, parameters; None where not needed."""
        needs, found, has_memory = self.needs, self.found, self.kept.pair is not None
        of_heads = needs.x or any(needs[3:9]) or needs.first_weight or needs.first_bias
        of_sum = of_heads or any(
            (needs.residual, needs.out_weight, needs.out_bias, needs.middle_weight,
             needs.middle_bias)
        )  # fmt: skip
        of_memory = of_sum or needs.memory or needs.cross_weight or needs.cross_bias
        of_cross_sum = of_memory or any(needs[-4:])
        needs_middle = of_cross_sum if has_memory else of_sum
        block_grad, through, sum_grad = self._last_sum(grad, sum_grad)
        normed_grad = self._feed_forward(block_grad, through, needs_middle)
        found["memory"] = memory_grad
        if has_memory and of_cross_sum:
            normed_grad, sum_grad = self._cross_norm_and_attention(
                normed_grad, sum_grad, memory_grad, of_memory, of_sum
            )
        if of_sum:
            assert normed_grad is not None
            self._attention(normed_grad, sum_grad, of_heads)
        return tuple(found.values())

    def _last_sum(
        self, grad: Tensor, sum_grad: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Compute the gradients of the last block, and of its residual: a norm, or a sum."""
        kept, own, how, needs = self.kept, self.own, self.call.how, self.needs
        if how.last_eps is not None:
            through, block_grad = self._norm(
                "last", "bias2", grad, None, kept.sum2, kept.mean2, kept.rstd2, kept.seed2,
                how.last_p, kept.before.dtype,
            )  # fmt: skip
            return block_grad, through, None
        if not how.adds_last:
            return grad, None, sum_grad
        if kept.seed2 is None and own.bias2 is None and kept.before.dtype == grad.dtype:
            return grad, None, grad
        total_grad, block_grad, *bias_grads = self.run.norm_backward(
            None, grad, grad, None, None, None, kept.seed2, how.last_p, "none", 1, False, False,
            needs.bias2, kept.before.dtype, grad.dtype if own.bias2 is None else own.bias2.dtype,
        )  # fmt: skip
        self.found["bias2"] = bias_grads[-1] if needs.bias2 else None
        differs = kept.seed2 is not None or kept.before.dtype != grad.dtype
        return block_grad if differs else total_grad, None, total_grad

    def _feed_forward(
        self, block_grad: Tensor, through: Tensor | None, needs_input: bool
    ) -> Tensor | None:
        """Compute the gradient of the block's input, to which ``through`` is added."""
        kept, own, how, needs = self.kept, self.own, self.call.how, self.needs
        if needs.weight2:
            hidden = kept.hidden
            if hidden is None:
                hidden = activated(self.run, kept.before, kept.hidden_seed, own, how)
            self.found["weight2"] = weight_gradient(block_grad, hidden)
        if not (needs_input or needs.weight1 or needs.bias1):
            return None
        hidden_grad = input_gradient(block_grad, own.weight2, None)
        given = hidden_grad, kept.before, own.bias1, kept.hidden_seed, how.hidden_p, how.activation
        if how.is_gated:
            before_grad, bias_grad = self.run.gated_backward(*given, False, needs.bias1)
        else:
            before_grad, bias_grad = self.run.activation_backward(*given, needs.bias1)
        self.found["bias1"] = bias_grad if needs.bias1 else None
        if needs.weight1 and kept.middle is not None:
            self.found["weight1"] = weight_gradient(before_grad, kept.middle)
        return input_gradient(before_grad, own.weight1, through) if needs_input else None

    def _cross_norm_and_attention(
        self,
        grad: Tensor | None,
        sum_grad: Tensor | None,
        memory_grad: Tensor | None,
        needs_attention: bool,
        needs_input: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Compute the gradients of what attends to the memory, and of the sum it is a norm of."""
        kept, own, call, needs = self.kept, self.own, self.call, self.needs
        assert grad is not None
        assert kept.query is not None
        assert kept.pair is not None
        assert kept.cross_merged is not None
        assert own.cross_out_weight is not None
        assert call.cross_terms is not None
        residual_grad, inner_grad = self._norm(
            "cross_norm", "cross_out_bias", grad, sum_grad, kept.cross_sum, kept.cross_mean,
            kept.cross_rstd, kept.cross_seed1, call.how.cross_p, kept.query.dtype,
        )  # fmt: skip
        if needs.cross_out_weight:
            self.found["cross_out_weight"] = weight_gradient(inner_grad, kept.cross_merged)
        if not needs_attention:
            return None, None
        query_grad, pair_grad = self.run.attention_backward(
            input_gradient(inner_grad, own.cross_out_weight, None),
            (kept.query, kept.pair),
            kept.cross_merged,
            kept.cross_statistics,
            call.batch,
            call.how.heads,
            call.cross_terms._replace(seed=kept.cross_seed),
        )
        (weight_q, _), (weight_kv, _) = cross_projections(own)
        if needs.cross_weight and kept.asking is not None and kept.memory is not None:
            self.found["cross_weight"] = joined(
                weight_gradient(query_grad, kept.asking), weight_gradient(pair_grad, kept.memory)
            )
        if needs.cross_bias:
            self.found["cross_bias"] = joined(bias_gradient(query_grad), bias_gradient(pair_grad))
        if needs.memory:
            self.found["memory"] = input_gradient(pair_grad, weight_kv, memory_grad)
        if not needs_input:
            return None, None
        is_open = call.how.last_eps is None
        through = None if is_open else residual_grad
        return input_gradient(query_grad, weight_q, through), residual_grad if is_open else None

    def _attention(self, grad: Tensor, sum_grad: Tensor | None, needs_heads: bool) -> None:
        """Compute the gradients of all before the norm behind self-attention."""
        kept, own, call, needs, found = self.kept, self.own, self.call, self.needs, self.found
        residual_grad, inner_grad = self._norm(
            "middle", "out_bias", grad, sum_grad, kept.sum1, kept.mean1, kept.rstd1, kept.seed1,
            call.how.middle_p, kept.projected.dtype,
        )  # fmt: skip
        if needs.residual:
            found["residual"] = residual_grad
        if needs.out_weight:
            found["out_weight"] = weight_gradient(inner_grad, kept.merged)
        if not needs_heads:
            return
        projected: tuple[Tensor, ...] = (kept.projected,)
        if kept.key is not None and kept.value is not None:
            projected = kept.projected, kept.key, kept.value
        grads = self.run.attention_backward(
            input_gradient(inner_grad, own.out_weight, None),
            projected,
            kept.merged,
            kept.statistics,
            call.batch,
            call.how.heads,
            call.terms._replace(seed=kept.seed),
        )
        if own.cos is not None and own.sin is not None:
            grads = self._turned_back(grads)
        has_first = call.how.first_eps is not None
        x_grad = None if self.is_apart or has_first else residual_grad
        needs_x = needs.x or needs.first_weight or needs.first_bias
        # The last first: what comes by the residual goes from one product to the one before.
        for name, (weight, _), part in reversed(
            list(zip(_NAMES, projections(own), grads, strict=False))
        ):
            if getattr(needs, f"{name}_weight") and kept.source is not None:
                found[f"{name}_weight"] = weight_gradient(part, kept.source)
            if getattr(needs, f"{name}_bias"):
                found[f"{name}_bias"] = bias_gradient(part)
            if needs_x:
                x_grad = input_gradient(part, weight, x_grad)
        if has_first and x_grad is not None:
            assert kept.x is not None
            x_grad, _ = self._norm(
                "first", None, x_grad, None, kept.x, kept.mean0, kept.rstd0, None, 0.0,
                kept.x.dtype,
            )  # fmt: skip
            x_grad = added(x_grad, residual_grad) if needs.x else None
        if needs.x:
            found["x"] = x_grad

    def _turned_back(self, grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Compute the gradients of queries and keys before they were turned."""
        own, call = self.own, self.call
        assert own.cos is not None
        assert own.sin is not None
        rest = (*half_tables(own), None, NO_NORMS, "none", 0.0, False, False)
        if len(grads) == 1:
            query, key = queries_and_keys(grads[0], call)
            self.run.rotary_backward(query, key, query, key, *rest, True)
            return grads  # which were written over
        query, key = (heads_of(rows, call) for rows in grads[:2])
        found = self.run.rotary_backward(query, key, query, key, *rest)
        return (*(heads.view(grads[0].shape) for heads in found[:2]), grads[2])

    def _norm(
        self,
        name: str,
        input_bias_name: str | None,
        grad: Tensor,
        sum_grad: Tensor | None,
        total: Tensor | None,
        mean: Tensor | None,
        rstd: Tensor | None,
        seed: Tensor | None,
        p: float,
        input_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        """Compute the gradients of a norm's residual and input; put its parameters' in place."""
        names = f"{name}_weight", f"{name}_bias", input_bias_name
        parameters = [None if one is None else getattr(self.own, one) for one in names]
        needs = [one is not None and getattr(self.needs, one) for one in names]
        dtype = common_dtype([None if t is None else t.dtype for t in parameters])
        residual_grad, input_grad, *grads = self.run.norm_backward(
            grad, sum_grad, total, mean, rstd, parameters[0], seed, p, self.call.how.norm, 1,
            *needs, input_dtype, dtype,
        )  # fmt: skip
        for one, parameter, need, found in zip(names, parameters, needs, grads, strict=True):
            if one is not None and need and parameter is not None:
                self.found[one] = in_dtype(parameter.dtype, found)
        # By the dispatcher, what is left out is an empty tensor.
        differs = seed is not None or input_dtype != residual_grad.dtype
        return residual_grad, input_grad if differs else residual_grad
