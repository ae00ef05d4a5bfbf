"""Look up embeddings of tokens, positions and types, and apply their norm and dropout."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedformer import ops
from fusedformer._internal import checks
from fusedformer._internal.autocast import autocast_dtype
from fusedformer.errors import BadTypeError, BadValueError

_FUNCTION = "embedding_layer_norm"


def embedding_layer_norm(
    input: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    position_ids: Tensor | None = None,
    position_weight: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    token_type_weight: Tensor | None = None,
    padding_idx: int | None = None,
    p: float = 0.0,
    training: bool = True,
) -> Tensor:
    """Compute the entry of an encoder in one kernel: added embeddings, their norm, dropout.

    ``dropout(layer_norm(weight[input] + position_weight[position_ids]
    + token_type_weight[token_type_ids]))``. Only the ids and two numbers a token are kept for the
    backward.

    Args:
        input: token ids, int32 or int64 ``[*]``: padded, packed or of any other shape.
        weight: vectors of the tokens, ``[num_embeddings, E]``.
        norm_weight: gain of shape ``[E]``, or None for 1.
        norm_bias: offset of shape ``[E]``, or None for 0.
        eps: added to the (biased) variance.
        position_ids, token_type_ids: like ``input``. ``position_ids`` and ``position_weight`` come
            together; without ``token_type_ids`` all tokens are of type 0.
        position_weight, token_type_weight: vectors ``[n, E]``, or None to add none.
        padding_idx: this row of ``weight`` gets no gradient; negative counts from the end.
        p: probability that an element is dropped, in [0, 1].
        training: no dropout if False.

    Returns:
        ``[*, E]`` in the dtype of ``weight``; float32 where autocast gives torch's norm that.

    Raises:
        TypeError: ids that are not int32 or int64, tables that are not floating-point or differ
            in dtype.
        ValueError: shapes or devices that differ; ids without their table or the reverse;
            ``padding_idx`` or ``p`` out of range; on the triton backend more than 8,192 columns.
        IndexError: an id without a vector, on the CPU. On a GPU, where the check would have to
            wait, the output of that token is NaN.

    Source: Devlin et al., BERT, arXiv:1810.04805, section 3 (the sum); norm and dropout as in its
    code.
    """
    ids = {"input": input, "position_ids": position_ids, "token_type_ids": token_type_ids}
    tables = {
        "weight": weight, "position_weight": position_weight,
        "token_type_weight": token_type_weight,
    }  # fmt: skip
    _check_ids(ids)
    _check_tables(tables)
    of = "the width of 'weight'"
    for name, parameter in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        checks.check_parameter(_FUNCTION, name, parameter, weight.shape[1:], of)
    others = {"norm_weight": norm_weight, "norm_bias": norm_bias}
    checks.check_same_device(_FUNCTION, {**tables, **ids, **others})
    checks.check_number(_FUNCTION, "eps", eps)
    checks.check_probability(_FUNCTION, "p", p)
    if (position_ids is None) != (position_weight is None):
        given = "'position_ids'" if position_weight is None else "'position_weight'"
        raise BadValueError(
            f"{_FUNCTION}(): expected 'position_ids' and 'position_weight' together, "
            f"but got {given} alone"
        )
    if token_type_ids is not None and token_type_weight is None:
        raise BadValueError(
            f"{_FUNCTION}(): expected 'token_type_weight' with 'token_type_ids', but got None"
        )
    for (id_name, indices), (name, table) in zip(ids.items(), tables.items(), strict=True):
        if indices is not None and table is not None:
            _check_range(id_name, indices, name, table.shape[0])
    if padding_idx is not None:
        count = weight.shape[0]
        if not -count <= padding_idx < count:
            raise BadValueError(
                f"{_FUNCTION}(): expected 'padding_idx' to be within the {count} rows of "
                f"'weight', but got {padding_idx}"
            )
        padding_idx %= count
    return ops.embedding_layer_norm(
        input,
        weight,
        norm_weight,
        norm_bias,
        eps,
        position_ids=position_ids,
        position_weight=position_weight,
        token_type_ids=token_type_ids,
        token_type_weight=token_type_weight,
        padding_idx=padding_idx,
        p=p if training else 0.0,
        dtype=autocast_dtype("layer_norm", weight),
    )


def _check_ids(ids: dict[str, Tensor | None]) -> None:
    shape: torch.Size | None = None
    for name, tensor in ids.items():
        if tensor is None and name != "input":
            continue
        checks.check_tensor(_FUNCTION, name, tensor)
        assert tensor is not None
        if tensor.dtype not in (torch.int32, torch.int64):
            raise BadTypeError(
                f"{_FUNCTION}(): expected '{name}' to be int32 or int64, but got {tensor.dtype}"
            )
        shape = tensor.shape if shape is None else shape
        checks.check_shape(_FUNCTION, name, tensor, shape, "that of 'input'")


def _check_tables(tables: dict[str, Tensor | None]) -> None:
    width: int | None = None
    dtype: torch.dtype | None = None
    for name, table in tables.items():
        if table is None and name != "weight":
            continue
        checks.check_tensor(_FUNCTION, name, table)
        assert table is not None
        checks.check_floating(_FUNCTION, name, table)
        dtype = table.dtype if dtype is None else dtype
        if table.dim() != 2 or table.shape[1] != (table.shape[1] if width is None else width):
            columns = "E" if width is None else width
            raise BadValueError(
                f"{_FUNCTION}(): expected '{name}' to have shape [vectors, {columns}], "
                f"but got {tuple(table.shape)}"
            )
        width = table.shape[1]
        if table.dtype != dtype:
            raise BadTypeError(
                f"{_FUNCTION}(): expected '{name}' to have the dtype of 'weight', {dtype}, "
                f"but got {table.dtype}"
            )


def _check_range(name: str, ids: Tensor, table: str, count: int) -> None:
    # Reading values would wait for a GPU.
    if ids.device.type != "cpu" or not checks.has_values(ids) or not ids.numel():
        return
    low, high = (int(bound) for bound in torch.aminmax(ids))
    if low < 0 or high >= count:
        raise IndexError(
            f"{_FUNCTION}(): expected '{name}' to be within the {count} rows of '{table}', "
            f"but got {low if low < 0 else high}"
        )
