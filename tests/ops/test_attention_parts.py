"""Around attention: mask tiles, split keys, merging, weights, position tables, memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as stock
from tests.ops.judge import DTYPES, check, first, grad
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fusedformer import backend, reference
from fusedformer import functional as F
from fusedformer.testing import assert_function_parity

NAME = "scaled_dot_product_attention"


def qkv(queries: int, keys: int, device: str, heads: int = 2, dim: int = 16) -> dict[str, Any]:
    return {
        "query": grad(1, heads, queries, dim, device=device),
        "key": grad(1, heads, keys, dim, device=device),
        "value": grad(1, heads, keys, dim, device=device),
    }


# Boolean masks by tile.


def document_mask(lengths: list[int], device: str) -> Tensor:
    index = torch.arange(len(lengths), device=device)
    document = index.repeat_interleave(torch.tensor(lengths, device=device))
    return document[:, None] == document


MASKS: dict[str, Callable[[int, str], Tensor]] = {
    "documents": lambda n, device: document_mask([n // 3, n // 4, n - n // 3 - n // 4], device),
    "prefix": lambda n, device: (
        torch.ones(n, n, device=device).tril().bool() | (torch.arange(n, device=device) < n // 4)
    ),
    "blocks": lambda n, device: (
        torch.rand(-(-n // 32), -(-n // 32), device=device) > 0.7
    ).repeat_interleave(32, 0).repeat_interleave(32, 1)[:n, :n],
    "empty": lambda n, device: torch.zeros(n, n, dtype=torch.bool, device=device),
}  # fmt: skip


@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("name", MASKS)
def test_structured_masks(name: str, causal: bool, device: str) -> None:
    mask = MASKS[name](150, device)
    inputs = qkv(150, 150, device)
    if name == "empty":
        output = F.scaled_dot_product_attention(**inputs, attn_mask=mask, is_causal=causal)
        grads = torch.autograd.grad(output, tuple(inputs.values()), torch.randn_like(output))
        assert all((t == 0).all() for t in (output, *grads))
    else:
        check(NAME, torch.float32, only=first, attn_mask=mask, is_causal=causal, **inputs)


def test_empty_tiles_are_not_walked_and_full_ones_do_not_read_the_mask(device: str) -> None:
    """Tiles with a True are listed; NaN in keys that only empty tiles hold does no harm."""
    from fusedformer_kernels.attention.arguments import attention_arguments
    from fusedformer_kernels.attention.mask_tiles import mask_tiles
    from fusedformer_kernels.attention.terms import AttentionTerms

    mask = torch.zeros(1, 1, 130, 200, dtype=torch.bool, device=device)
    mask[..., :64, 64:128] = True  # full in the first row of blocks
    mask[..., 70, 5] = mask[..., 129, 199] = True  # partial ones
    inputs = qkv(130, 200, device)
    arguments = attention_arguments(
        inputs["query"], inputs["key"], 16, AttentionTerms(mask=mask)
    )  # fmt: skip
    tiles = mask_tiles(arguments, 64, 64)
    lists = [
        entries[:count]
        for entries, count in zip(
            tiles.entries[0, 0].tolist(), tiles.counts[0, 0].tolist(), strict=True
        )
    ]
    assert lists == [[2 * 1], [2 * 0 + 1], [2 * 3 + 1]]
    by_column = mask_tiles(arguments, 64, 64, of_columns=True)
    assert by_column.counts[0, 0].tolist() == [1, 1, 0, 1]
    poisoned = {n: t.detach().clone() for n, t in inputs.items()}
    poisoned["key"][:, :, 128:192] = torch.nan
    poisoned["value"][:, :, 128:192] = torch.nan
    leaves = {n: t.requires_grad_() for n, t in poisoned.items()}
    output = F.scaled_dot_product_attention(**leaves, attn_mask=mask)
    clean = F.scaled_dot_product_attention(**inputs, attn_mask=mask)
    assert torch.equal(output[:, :, :128], clean[:, :, :128])


@pytest.mark.parametrize("shape", [(2, 1, 1, 70), (1, 3, 1, 70), (1, 1, 50, 1)], ids=str)
def test_a_mask_that_broadcasts_is_listed_once(shape: tuple[int, ...], device: str) -> None:
    from fusedformer_kernels.attention.arguments import attention_arguments
    from fusedformer_kernels.attention.mask_tiles import mask_tiles
    from fusedformer_kernels.attention.terms import AttentionTerms

    mask = torch.rand(shape, device=device) > 0.5
    query, key = torch.randn(2, 3, 50, 16, device=device), torch.randn(2, 3, 70, 16, device=device)
    arguments = attention_arguments(query, key, 16, AttentionTerms(mask=mask))
    counts = mask_tiles(arguments, 16, 16).counts
    assert counts.shape == (*shape[:2], 1 if shape[2] == 1 else 4)


# Windows.


@pytest.mark.parametrize("align", ["top_left", "bottom_right"])
def test_tiles_outside_the_window_are_not_walked(align: Any, device: str) -> None:
    """NaN in them does no harm, forward or backward, on either side."""
    inputs = qkv(40, 400, device)
    first_key = 0 if align == "top_left" else 360
    reached = slice(max(first_key - 20, 0), first_key + 70)
    poisoned = {n: t.detach().clone() for n, t in inputs.items()}
    for name in ("key", "value"):
        for far in (slice(0, max(reached.start - 128, 0)), slice(reached.stop + 128, None)):
            poisoned[name][:, :, far] = torch.nan
    leaves = {n: t.requires_grad_() for n, t in poisoned.items()}
    settings: dict[str, Any] = {"window": (20, 30), "causal_alignment": align}
    outputs = [F.scaled_dot_product_attention(**x, **settings) for x in (inputs, leaves)]
    assert torch.equal(*outputs)
    dy = torch.randn_like(outputs[0])
    clean, dirty = (
        torch.autograd.grad(o, tuple(x.values()), dy)
        for o, x in zip(outputs, (inputs, leaves), strict=True)
    )
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    assert (clean[1][:, :, : reached.start] == 0).all()
    assert (clean[1][:, :, reached.stop :] == 0).all()


# Few queries: keys in splits, merged.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", [1, 16])
def test_few_queries(queries: int, dtype: torch.dtype, device: str) -> None:
    """In three draws: one log-sum-exp's rounding was shared by all weights of a query."""
    form: dict[str, Any] = {
        "return_lse": True,
        "is_causal": True,
        "causal_alignment": "bottom_right",
    }
    for seed in (1, 2, 3):
        torch.manual_seed(seed)
        check(NAME, dtype, **form, **qkv(queries, 1300, device))


def test_few_queries_split_the_keys(device: str) -> None:
    from fusedformer_kernels.runtime.launch import recorded_launches

    inputs = {n: t.detach() for n, t in qkv(1, 1300, device).items()}
    with recorded_launches(run=True) as launches:
        F.scaled_dot_product_attention(**inputs)
    assert [launch.name for launch in launches] == ["_attention_forward", "_merge_splits"]
    assert launches[0].grid == (2, 3)


def test_few_queries_share_the_keys_backward(device: str) -> None:
    """Parts of dq, with all that hides keys from some of them, and the same bits in every run."""
    from fusedformer_kernels.runtime.launch import recorded_launches

    inputs: dict[str, Any] = {
        "query": grad(2, 2, 5, 24, device=device),
        "key": grad(2, 1, 600, 24, device=device),
        "value": grad(2, 1, 600, 16, device=device),
    }
    form: dict[str, Any] = {
        "key_lengths": torch.tensor([0, 590], device=device), "enable_gqa": True,
        "is_causal": True, "causal_alignment": "bottom_right", "window": (300, -1),
    }  # fmt: skip
    check(NAME, torch.float16, **form, **inputs, return_lse=True)
    leaves = {n: t.detach().half().requires_grad_() for n, t in inputs.items()}
    attention: Any = F.scaled_dot_product_attention
    output = attention(**leaves, **form, dropout_p=0.3)
    dy = torch.randn_like(output)
    runs = []
    for _ in range(2):
        with recorded_launches(run=True) as launches:
            found = torch.autograd.grad(output, tuple(leaves.values()), dy, retain_graph=True)
        runs.append(found)
        assert [launch.name for launch in launches][1:] == [
            "_few_queries_backward", "_sum_query_parts",
        ]  # fmt: skip
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))
    assert not any(t[0].any() for t in runs[0]) and all(t[1].any() for t in runs[0])


@pytest.mark.parametrize("unneeded", ["query", "key", "value"])
def test_few_queries_have_the_same_gradients_in_part(unneeded: str, device: str) -> None:
    inputs = qkv(2, 520, device, heads=1)
    output = F.scaled_dot_product_attention(**inputs)
    dy = torch.randn_like(output)
    whole = dict(zip(inputs, torch.autograd.grad(output, tuple(inputs.values()), dy), strict=True))
    some = {n: t.detach() if n == unneeded else t for n, t in inputs.items()}
    names = [n for n in inputs if n != unneeded]
    output = F.scaled_dot_product_attention(**some)
    found = torch.autograd.grad(output, [inputs[n] for n in names], dy)
    assert all(torch.equal(whole[n], t) for n, t in zip(names, found, strict=True))


def test_parts_of_few_queries_take_no_more_memory_than_the_keys() -> None:
    from fusedformer_kernels.attention import configs
    from fusedformer_kernels.runtime import targets

    target = targets.TARGETS["sm_90"]
    for dim, operands, size in ((64, "half", 2), (128, "half", 2), (256, "ieee", 4)):
        kind = configs.AttentionKind(dim, operands)
        for queries, group in itertools.product((1, 7, 16), (1, 2, 8, 32)):
            found = configs.few_queries_backward_config(kind, target, queries, 4096, group)
            assert found is not None or queries * group > 16
            if found is not None:
                assert 4096 // found.block_n * queries * group * 4 <= 4096 * size
    assert configs.few_queries_backward_config(kind, target, 17, 4096, 1) is None
    assert configs.few_queries_backward_config(kind, target, 1, 512, 1) is None


def test_splits_that_see_nothing(device: str) -> None:
    """Lengths end in the first split of three, and one sequence has no key at all."""
    inputs = {n: t.detach().expand(2, -1, -1, -1) for n, t in qkv(2, 1300, device).items()}
    lengths = torch.tensor([0, 40], device=device)
    output, lse = F.scaled_dot_product_attention(**inputs, key_lengths=lengths, return_lse=True)
    assert (output[0] == 0).all()
    assert (lse[0] == -torch.inf).all()
    short = {"query": inputs["query"][1:]}
    short |= {n: inputs[n][1:, :, :40] for n in ("key", "value")}
    assert torch.allclose(output[1:], F.scaled_dot_product_attention(**short), atol=1e-6)


# Merging.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merged_parts_are_the_whole(dtype: torch.dtype, device: str) -> None:
    """Ring attention in small: two parts of the keys, with gradients through both."""
    inputs = qkv(20, 70, device)

    def in_parts(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        parts = [
            F.scaled_dot_product_attention(query, k, v, return_lse=True)
            for k, v in zip(key.split(33, 2), value.split(33, 2), strict=True)
        ]
        merged = F.merge_attention_states(*parts[0], *parts[1])
        return F.merge_attention_states(*merged, *parts[2])

    def whole(**arguments: Tensor) -> Any:
        with backend("torch"):
            return in_parts(**arguments)

    assert_function_parity(
        in_parts, whole, reference.scaled_dot_product_attention, inputs, dtype=dtype
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merge(dtype: torch.dtype, device: str) -> None:
    """Strided outputs; the log-sum-exps stay float32."""
    outputs = [torch.randn(2, 3, 5, 24, device=device).transpose(1, 2) for _ in range(2)]
    lses = [torch.randn(2, 5, 3, device=device).mul(3).requires_grad_() for _ in range(2)]
    first_output, second_output = (o.to(dtype).requires_grad_() for o in outputs)
    inputs = {
        "output1": first_output, "lse1": lses[0], "output2": second_output, "lse2": lses[1],
    }  # fmt: skip

    def torchs(**arguments: Tensor) -> Any:
        with backend("torch"):
            return F.merge_attention_states(**arguments)

    assert_function_parity(
        F.merge_attention_states, torchs, reference.merge_attention_states, inputs
    )


@pytest.mark.parametrize("name", ["triton", "torch"])
def test_merging_with_nothing(name: Any, device: str) -> None:
    output, lse = grad(2, 5, 8, device=device), grad(2, 5, device=device)
    nothing = torch.full((2, 5), -torch.inf, device=device).requires_grad_()
    zeros = torch.zeros(2, 5, 8, device=device).requires_grad_()
    with backend(name):
        for parts in ((output, lse, zeros, nothing), (zeros, nothing, output, lse)):
            merged, merged_lse = F.merge_attention_states(*parts)
            assert torch.equal(merged, output)
            assert torch.equal(merged_lse, lse)
        merged, merged_lse = F.merge_attention_states(zeros, nothing, zeros, nothing)
        assert (merged == 0).all()
        assert (merged_lse == -torch.inf).all()
        for gradient in torch.autograd.grad(merged, (zeros, nothing), torch.randn_like(merged)):
            assert gradient.isfinite().all()


# Weights.


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("kind", ["per_head", "averaged"])
def test_weights_are_those_that_made_the_output(kind: Any, dropout: float, device: str) -> None:
    inputs = qkv(20, 70, device, heads=3)
    torch.manual_seed(2)
    output, weights = F.scaled_dot_product_attention(
        **inputs, dropout_p=dropout, return_weights="per_head"
    )
    assert torch.allclose(weights @ inputs["value"], output, atol=1e-5)
    torch.manual_seed(2)
    again, asked = F.scaled_dot_product_attention(**inputs, dropout_p=dropout, return_weights=kind)
    assert torch.equal(again, output)
    wanted = weights.mean(1) if kind == "averaged" else weights
    assert torch.allclose(asked, wanted, atol=1e-6)


def test_averaged_weights_take_no_more_memory_than_they_are(device: str) -> None:
    from fusedformer_kernels.attention.terms import AttentionTerms
    from fusedformer_kernels.attention.weights import attention_weights

    query, key, _ = (t.detach() for t in qkv(64, 128, device, heads=8).values())
    lse = torch.zeros(1, 8, 64, device=device)
    used = allocated(lambda: attention_weights(query, key, lse, AttentionTerms(), True))
    assert used == 64 * 128 * 4


# Positions.


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (8, 20), (64, 300), (32, 100)])
def test_t5_buckets(bidirectional: bool, buckets: int, distance: int, device: str) -> None:
    """The very buckets of transformers' T5, and of the definition."""
    weight = torch.arange(float(buckets), device=device)[:, None].repeat(1, 2)
    settings: dict[str, Any] = {"bidirectional": bidirectional, "max_distance": distance}
    table = F.relative_position_bias(weight, **settings)
    assert table.shape == (2, 2 * distance + 1)
    assert torch.equal(table, reference.relative_position_bias(weight, **settings))
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    relative = torch.arange(-2 * distance, 2 * distance + 1)
    theirs = t5.T5Attention._relative_position_bucket(relative, bidirectional, buckets, distance)
    ours = table[0].cpu()[relative.clamp(-distance, distance) + distance]
    assert torch.equal(ours, theirs.float())


def test_t5_bias_is_learned_through_its_buckets(device: str) -> None:
    """Against the bias of queries by keys that transformers would add."""
    inputs = qkv(40, 60, device)
    inputs["weight"] = grad(32, 2, device=device)
    index = torch.arange(60, device=device) - torch.arange(40, device=device)[:, None]

    def call(module: Any, **arguments: Tensor) -> Any:
        table = module.relative_position_bias(arguments.pop("weight"), max_distance=50)
        return module.scaled_dot_product_attention(**arguments, relative_bias=table)

    def materialized(weight: Tensor, **arguments: Any) -> Tensor:
        table = reference.relative_position_bias(weight, max_distance=50)
        return stock.scaled_dot_product_attention(
            **arguments, attn_mask=table[:, index.clamp(-50, 50) + 50]
        )

    assert_function_parity(
        lambda **arguments: call(F, **arguments), materialized,
        lambda **arguments: call(reference, **arguments)[0], inputs, dtype=torch.float32,
    )  # fmt: skip


@pytest.mark.parametrize("radius", [1, 3, 70, 300])
def test_table_gradient_over_diagonals_of_tiles(radius: int, device: str) -> None:
    """Tables that end within a tile, within its diagonal's sums, and beyond all distances."""
    inputs = qkv(70, 140, device)
    inputs["relative_bias"] = grad(1 if radius == 3 else 2, 2 * radius + 1, device=device)
    flags = {
        "is_causal": radius == 70,
        "causal_alignment": "bottom_right" if radius else "top_left",
    }
    check(NAME, torch.bfloat16, only=first, **flags, **inputs)


def test_alibi_is_the_bias_of_its_paper(device: str) -> None:
    """Slopes 2^(-8h/H): the same as a materialized bias, causal."""
    inputs = qkv(50, 50, device, heads=4)
    slopes = torch.tensor([2.0 ** (-8 * h / 4) for h in range(1, 5)], device=device)
    row = torch.arange(50.0, device=device)
    bias = slopes[:, None, None] * (row - row[:, None])
    bias = bias.masked_fill(row > row[:, None], -torch.inf)
    want = stock.scaled_dot_product_attention(**inputs, attn_mask=bias)
    ours = F.scaled_dot_product_attention(**inputs, alibi_slopes=slopes, is_causal=True)
    assert torch.allclose(ours, want, atol=1e-6)


# Shapes and memory.


@pytest.mark.parametrize("dim", [32, 40, 72, 80, 96, 160, 192])
def test_head_dims(dim: int, device: str) -> None:
    inputs = qkv(20, 70, device, dim=dim)
    check(NAME, torch.float16, only=first, window=(30, -1), **inputs)


class Allocations(TorchDispatchMode):
    """Bytes of all tensors that calls create."""

    CREATE = ("empty", "zeros", "full", "new_", "_to_copy", "clone")

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if str(func).removeprefix("aten.").startswith(self.CREATE):
            self.bytes += result.numel() * result.element_size()
        return result


def allocated(call: Callable[[], object]) -> int:
    """What a call of launchers allocates; no kernel runs."""
    from fusedformer_kernels.runtime.launch import recorded_launches

    with recorded_launches(run=False), Allocations() as seen:
        call()
    return seen.bytes


MEMORY: dict[str, Callable[[int, str], dict[str, Any]]] = {
    "plain": lambda n, device: {},
    "dropout": lambda n, device: {"p": 0.1, "seed": torch.tensor([1], device=device)},
    "causal": lambda n, device: {"right": 0},
    "window": lambda n, device: {"left": 64, "right": 64},
    "slopes": lambda n, device: {"slopes": torch.rand(1, 2, device=device)},
    "table": lambda n, device: {"table": torch.rand(2, 257, device=device)},
    "table as long as the sequence": lambda n, device: {
        "table": torch.rand(2, 2 * n + 1, device=device)
    },
    "gated table": lambda n, device: {
        "table": torch.rand(2, 257, device=device), "gate": torch.rand(1, 2, n, device=device),
    },
    "sinks": lambda n, device: {"sinks": torch.rand(2, device=device)},
    "key lengths": lambda n, device: {"key_lengths": torch.tensor([n // 2], device=device)},
    "softcap": lambda n, device: {"softcap": 20.0},
    "bias of keys": lambda n, device: {"mask": torch.rand(1, 1, 1, n, device=device)},
    "packed": lambda n, device: {
        "starts_q": torch.tensor([0, n // 3, n], device=device),
        "starts_k": torch.tensor([0, n // 3, n], device=device),
        "max_queries": n, "max_keys": n,
    },
}  # fmt: skip


@pytest.mark.parametrize("queries", ["as many", "few"])
@pytest.mark.parametrize("name", MEMORY)
def test_memory_grows_linearly(name: str, queries: str, device: str) -> None:
    """All that forward and backward allocate, at lengths of which one is four times the other."""
    from fusedformer_kernels.attention.backward import attention_backward
    from fusedformer_kernels.attention.forward import attention_forward
    from fusedformer_kernels.attention.terms import AttentionTerms

    used = []
    for length in (4096, 16384):
        rows = length if queries == "as many" or name == "packed" else 4
        query, key, value = (t.detach() for t in qkv(rows, length, device).values())
        terms = AttentionTerms(**MEMORY[name](length, device))
        if terms.gate is not None:
            terms = terms._replace(gate=terms.gate[..., :rows])
        given = terms.mask, terms.slopes, terms.table, terms.gate, terms.sinks
        learned = [t is not None for t in given]

        def both(
            q: Any = query, k: Any = key, v: Any = value, terms: Any = terms, learned: Any = learned
        ) -> None:
            output, _, statistics = attention_forward(q, k, v, terms)
            needs = [True, True, True, *learned]
            attention_backward(output, None, q, k, v, output, statistics, terms, needs)

        used.append(allocated(both))
    inputs = 3 * 2 * 16384 * 16 * 4
    assert inputs / 2 < used[1] <= 4.1 * used[0]
    assert used[1] < 20 * inputs
