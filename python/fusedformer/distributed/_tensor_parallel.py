"""Tensor parallelism by ``torch.distributed.tensor.parallel.parallelize_module``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from fusedformer.distributed._layers import (
    ParallelDecoder,
    ParallelDecoderLayer,
    ParallelEncoder,
    ParallelEncoderLayer,
)
from fusedformer.distributed._region import Region
from fusedformer.nn import (
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)
from fusedformer.nn.children import is_sharded
from fusedformer.nn.stacks import is_fused

_LAYERS: dict[type[Any], type[Any]] = {
    TransformerEncoderLayer: ParallelEncoderLayer,
    TransformerDecoderLayer: ParallelDecoderLayer,
}
_STACKS: dict[type[Any], tuple[type[Any], type[Any]]] = {
    TransformerEncoder: (ParallelEncoder, TransformerEncoderLayer),
    TransformerDecoder: (ParallelDecoder, TransformerDecoderLayer),
}
_PARALLEL = (ParallelEncoder, ParallelDecoder, ParallelEncoderLayer, ParallelDecoderLayer)
_KNOWN = (*_LAYERS, *_STACKS, Transformer)
_Places = list[tuple[nn.Module, str, Placement]]


class TransformerParallel(ParallelStyle):
    """Heads and hidden features of encoders and decoders spread over the ranks of a mesh.

    A style for ``torch.distributed.tensor.parallel.parallelize_module``, of this library's
    ``TransformerEncoderLayer``, ``TransformerDecoderLayer``, ``TransformerEncoder``,
    ``TransformerDecoder`` and ``Transformer``, made so or by ``fuse``:

    - query, key and value are projected column-wise by head, and attended to by their rank alone;
      the output projection is row-wise;
    - the feed-forward block is column-wise, then row-wise;
    - the steps between are the fused ones, and padding is not computed: both as before.

    Input and output are plain tensors, whole and alike on every rank, and so are input gradients.
    Parameters become DTensors on the mesh. Those of projections keep their three parts apart:
    ``in_proj_weight`` is ``[3, E, E]`` and ``in_proj_bias`` ``[3, E]``, both ``Shard(1)``, so that
    ``full_tensor()`` and checkpoints are in order; this library's modules load either form, and
    ``flatten(0, 1)`` is torch's. Shard over other ranks with ``fully_shard`` afterwards.

    Ranks must draw the same random numbers (``torch.manual_seed`` with one seed for all): dropout
    of whole tensors is then the same on all, and that of spread tensors differs by rank.

    Args:
        sequence_parallel: between the products each rank has its part of the tokens: norms,
            residuals and their dropout are computed once, not on every rank, and their results are
            kept once. It holds in stacks and wherever they can run packed: batches with a
            boolean padding mask or none, with no other mask but the causal one.

    Raises:
        TypeError: the module is none of these.
        ValueError: heads or ``dim_feedforward`` do not divide by the mesh; the mesh is not 1-D; a
            layer or norm carries hooks, has replaced children or a subclass of its own; it is
            sharded or parallel already.

    Source: Shoeybi et al., arXiv:1909.08053; Korthikanti et al., arXiv:2205.05198.
    """

    def __init__(self, *, sequence_parallel: bool = False) -> None:
        super().__init__()
        self.sequence_parallel = sequence_parallel

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if device_mesh.ndim != 1:
            raise ValueError(
                f"TransformerParallel: expected a 1-D mesh, but got {device_mesh.ndim} dimensions; "
                f"take one of them, as in mesh['tp']"
            )
        given: Any = module
        stacks = [given.encoder, given.decoder] if isinstance(given, Transformer) else [given]
        for stack in stacks:
            _check(stack, device_mesh.size())
        region = Region(device_mesh, self.sequence_parallel)
        for stack in stacks:
            layers = stack.layers if type(stack) in _STACKS else [stack]
            for layer in layers:
                self._distribute(_places(layer), device_mesh)
                layer.__class__ = _LAYERS[type(layer)]
                layer._region = region
            if type(stack) in _STACKS:
                self._distribute(_replicated(stack.norm), device_mesh)
                stack.__class__ = _STACKS[type(stack)][0]
                stack._region = region
                stack._always_packs = self.sequence_parallel
        return module

    def _distribute(self, places: _Places, mesh: DeviceMesh) -> None:
        for module, name, placement in places:
            parameter = getattr(module, name)
            if parameter is None:
                continue
            tensor = parameter.detach()
            if name.startswith("in_proj"):
                tensor = tensor.unflatten(0, (3, -1))
            spread = distribute_tensor(tensor, mesh, [placement], src_data_rank=self.src_data_rank)
            module.register_parameter(name, nn.Parameter(spread, parameter.requires_grad))


def tensor_parallel_plan(
    module: nn.Module, *, sequence_parallel: bool = False
) -> ParallelStyle | dict[str, ParallelStyle]:
    """Make the plan for ``parallelize_module(module, mesh, plan)``.

    Args:
        module: an encoder or decoder of this library, one of their layers, or a model with such
            stacks or layers anywhere in it.
        sequence_parallel: as for :class:`TransformerParallel`.

    Returns:
        The style of ``module`` itself, or those of modules in it by path. Entries for other modules
        (embeddings, heads) may be added.

    Raises:
        ValueError: there is none in ``module``.
    """
    if isinstance(module, _KNOWN):
        return TransformerParallel(sequence_parallel=sequence_parallel)
    plan: dict[str, ParallelStyle] = {
        path: TransformerParallel(sequence_parallel=sequence_parallel)
        for path in _paths(module, "")
    }
    if not plan:
        raise ValueError(
            f"tensor_parallel_plan(): expected 'module' to have encoders or decoders of "
            f"fusedformer.nn in it, but {type(module).__name__} has none; fuse() makes them of "
            f"torch.nn's"
        )
    return plan


def _paths(module: nn.Module, prefix: str) -> Iterator[str]:
    for name, child in module.named_children():
        if isinstance(child, _KNOWN):
            yield prefix + name
        else:
            yield from _paths(child, f"{prefix}{name}.")


def _check(module: Any, size: int) -> None:
    """Check that all of ``module`` can be spread over ``size`` ranks."""
    name = type(module).__name__
    if is_sharded(module) or isinstance(module, _PARALLEL):
        raise ValueError(
            f"TransformerParallel: expected a module as it was made, but {name} is sharded or "
            f"parallel already; parallelize_module comes before fully_shard"
        )
    if type(module) in _STACKS:
        _, layer_type = _STACKS[type(module)]
        layers = list(module.layers)
        fits = is_fused(module, layer_type)
    elif type(module) in _LAYERS:
        layers, fits = [module], module._can_pack()
    else:
        raise TypeError(
            f"TransformerParallel: expected an encoder, a decoder or a layer of fusedformer.nn, "
            f"but got {name}"
        )
    if not fits or any(type(layer) not in _LAYERS for layer in layers):
        raise ValueError(
            f"TransformerParallel: expected {name} to have layers and a norm of this library, "
            f"without hooks, replaced children or subclasses, not sharded or parallel already"
        )
    for layer in layers:
        sizes = {
            "nhead": layer.self_attn.num_heads, "dim_feedforward": layer.linear1.out_features
        }  # fmt: skip
        for setting, value in sizes.items():
            if value % size:
                raise ValueError(
                    f"TransformerParallel: expected '{setting}' of {type(layer).__name__} to be a "
                    f"multiple of the mesh's {size} ranks, but got {value}"
                )
        if isinstance(layer.activation, nn.Module) and list(layer.activation.parameters()):
            raise ValueError(
                f"TransformerParallel: expected an activation without parameters, "
                f"but got {type(layer.activation).__name__}"
            )


def _places(layer: Any) -> _Places:
    """List each parameter of a layer, and how it is spread."""
    places: _Places = [
        (layer.linear1, "weight", Shard(0)), (layer.linear1, "bias", Shard(0)),
        (layer.linear2, "weight", Shard(1)), (layer.linear2, "bias", Replicate()),
    ]  # fmt: skip
    for name in ("self_attn", "multihead_attn"):
        attention = getattr(layer, name, None)
        if attention is not None:
            places += [
                (attention, "in_proj_weight", Shard(1)), (attention, "in_proj_bias", Shard(1)),
                (attention.out_proj, "weight", Shard(1)),
                (attention.out_proj, "bias", Replicate()),
            ]  # fmt: skip
    for name in ("norm1", "norm2", "norm3"):
        places += _replicated(getattr(layer, name, None))
    return places


def _replicated(norm: Any) -> _Places:
    return [] if norm is None else [(norm, name, Replicate()) for name in ("weight", "bias")]
