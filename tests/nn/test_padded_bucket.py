"""What a padded batch costs outside the layers: five launches, and no operator of torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fusedformer import backend, nn
from fusedformer.functional import Packing, pack

pytest.importorskip("triton")

from fusedformer_kernels.runtime.launch import recorded_launches

# Of a layer; what else runs is Triton's interpreter, and products.
LAYER = {"_attention_forward", "_norm_forward", "_bias_activation_forward"}
PRODUCTS = {"mm", "addmm", "linear"}
INTERPRETER = {"set_", "copy_"}


class Operators(TorchDispatchMode):
    """Notes operators that are no views and allocate more than memory."""

    only_looks = True  # to the library: calls take the way that they take without it

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and "empty" not in name and name != "promote_types":
            self.seen.add(name)
        return func(*args, **(kwargs or {}))


def outside_of_layers(call: Any, run: bool) -> tuple[list[str], set[str]]:
    operators = Operators()
    with backend("triton"), torch.no_grad(), recorded_launches(run=run) as found, operators:
        call()
    names = [one.name for one in found if one.name not in LAYER]
    return names, operators.seen - PRODUCTS - (INTERPRETER if run else set())


PACKS = ["_count_tokens", "_place_tokens", "_gather_rows", "_list_work"]


@pytest.mark.parametrize("static_shapes", [False, True], ids=["lengths read", "static shapes"])
def test_the_encoder_packs_and_unpacks_by_five_launches(static_shapes: bool, device: str) -> None:
    layer = nn.TransformerEncoderLayer(32, 2, 48, batch_first=True, device=device)
    encoder = nn.TransformerEncoder(layer, 2, static_shapes=static_shapes).eval()
    x = torch.randn(3, 9, 32, device=device)
    padding = (torch.arange(9) >= torch.tensor([[9], [4], [6]])).to(device)
    # What a read length decides must be written by the kernels.
    launches, operators = outside_of_layers(
        lambda: encoder(x, src_key_padding_mask=padding), run=not static_shapes
    )
    assert launches == [*PACKS, "_gather_rows"]
    if device == "cpu" or static_shapes:
        assert not operators


def test_known_lengths_are_not_read_back(device: str) -> None:
    keep = (torch.arange(9) < torch.tensor([[9], [4], [6]])).to(device)
    x = torch.randn(3, 9, 32, device=device)
    launches, operators = outside_of_layers(
        lambda: pack(x, Packing.of(keep, lengths=[9, 4, 6])), run=False
    )
    assert launches == PACKS[:3]
    assert not operators
