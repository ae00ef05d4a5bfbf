"""Choose how the kernels multiply float32."""

from __future__ import annotations

from typing import Literal

from fusedformer._internal.backend import TRITON_IS_INSTALLED

Products = Literal["torch", "tf32x3"]


def set_float32_products(name: Products) -> None:
    """Set how attention's kernels multiply float32, for all threads of the process.

    Args:
        name: ``"torch"``, the default: as torch's own setting for CUDA's matrix products says, in
            IEEE float32, or in TF32 where ``torch.backends.cuda.matmul.fp32_precision`` is
            ``"tf32"`` (``torch.set_float32_matmul_precision("high")`` makes it that).
            ``"tf32x3"``: in the place of IEEE products, three of TF32 each on tensor cores, where
            the device is of sm_80 or later and head dims are at most 64.

    Raises:
        ValueError: ``name`` is neither.
    """
    if name not in ("torch", "tf32x3"):
        raise ValueError(
            f"set_float32_products(): name must be 'torch' or 'tf32x3', but got {name!r}"
        )
    if TRITON_IS_INSTALLED:
        from fusedformer_kernels.runtime import targets

        targets.set_float32_products(name)
