"""Attention's features as a table of choices, and calls that combine them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tests.ops.judge import FEW, grad, is_right_over
from torch import Tensor

from fusedformer import backend, functional, reference
from fusedformer.testing import Comparison, parity

P = 0.25
# Lengths of (queries, keys) by sequence: more than one tile, odd, empty on either side.
LENGTHS: dict[str, list[tuple[int, int]]] = {
    "square": [(37, 37), (70, 70)],
    "cross": [(21, 45), (70, 33)],
    "empty": [(40, 0), (0, 17), (19, 70)],
    "few queries": [(3, 560), (1, 70)],
}
# Each feature and what it may be; the first choice is its absence.
CHOICES: dict[str, Sequence[Any]] = {
    "form": ("padded", "packed", "interleaved", "nested"),
    "lengths": tuple(LENGTHS),
    "band": ("full", "causal", "window", "causal window", "left window"),
    "causal_alignment": ("top_left", "bottom_right"),
    "mask": (None, "boolean", "boolean keys", "additive", "additive per head", "additive keys"),
    "key_lengths": (False, True),
    "key_mask": (False, True),
    "alibi_slopes": (None, "heads", "batch"),
    "relative_bias": (None, 3, 100, "gated"),
    "sinks": (False, True),
    "softcap": (None, 2.0),
    "dropout": (False, True),
    "group": (1, 2),
    "dims": ((16, 16), (40, 24)),
    "scale": (None, -0.3),
    "also": ((), ("lse",), ("weights",), ("averaged",)),
    "dtype": (torch.float32, torch.float16, torch.bfloat16),
}  # fmt: skip
BANDS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"is_causal": True},
    "window": {"window": (9, 14)},
    "causal window": {"is_causal": True, "window": (20, -1)},
    "left window": {"window": (5, -1)},
}
Combination = Mapping[str, Any]


def sensible(choice: Combination) -> Combination:
    """The same without what does not exist in the form at hand."""
    fixed = dict(choice)
    packed = fixed["form"] != "padded"
    if packed:
        fixed["key_mask"] = False
    if packed and fixed["also"] not in ((), ("lse",)):
        fixed["also"] = ()
    if fixed["form"] == "interleaved":  # one projection: as many keys as queries, of the same size
        fixed |= {"lengths": "square", "group": 1, "dims": (16, 16)}
    if fixed["form"] == "nested" and fixed["lengths"] == "few queries":
        fixed["form"] = "packed"  # a bound on the longest is all it has, so keys are not split
    return fixed


def pairwise() -> list[Combination]:
    """Few combinations in which every pair of choices occurs, greedily found; always the same."""
    names = list(CHOICES)
    missing = {
        (a, i, b, j)
        for a, b in itertools.combinations(names, 2)
        for i in range(len(CHOICES[a]))
        for j in range(len(CHOICES[b]))
    }
    rows: list[Combination] = []
    while missing:
        a, i, b, j = min(missing)
        row = {a: i, b: j}
        for name in names:
            if name in row:
                continue
            row[name] = max(
                range(len(CHOICES[name])),
                key=lambda k: (
                    sum(_pair(name, k, other, row[other]) in missing for other in row),
                    -k,
                ),
            )
        missing -= {_pair(x, row[x], y, row[y]) for x, y in itertools.combinations(names, 2)}
        rows.append({name: CHOICES[name][index] for name, index in row.items()})
    return rows


_ORDER = {name: position for position, name in enumerate(CHOICES)}


def _pair(a: str, i: int, b: str, j: int) -> tuple[str, int, str, int]:
    return (a, i, b, j) if _ORDER[a] < _ORDER[b] else (b, j, a, i)


@dataclass
class Call:
    """One drawn combination: inputs, settings, and how the three judges call it."""

    choice: Combination
    lengths: list[tuple[int, int]]
    inputs: dict[str, Any]
    settings: dict[str, Any]
    keep: Tensor | None

    @staticmethod
    def draw(choice: Combination, device: str) -> Call:
        choice = sensible(choice)
        lengths = LENGTHS[choice["lengths"]]
        sequences, heads = len(lengths), 2
        queries, keys = (max(side) for side in zip(*lengths, strict=True))
        settings = {
            **BANDS[choice["band"]], "causal_alignment": choice["causal_alignment"],
            "softcap": choice["softcap"], "scale": choice["scale"],
            "enable_gqa": choice["group"] > 1,
        }  # fmt: skip
        dim, value_dim = choice["dims"]
        key_heads = heads // choice["group"]
        if choice["form"] == "padded":
            shapes: dict[str, tuple[int, ...]] = {
                "query": (sequences, heads, queries, dim),
                "key": (sequences, key_heads, keys, dim),
                "value": (sequences, key_heads, keys, value_dim),
            }
        else:
            totals = [sum(side) for side in zip(*lengths, strict=True)]
            shapes = {
                "query": (totals[0], heads, dim),
                "key": (totals[1], key_heads, dim),
                "value": (totals[1], key_heads, value_dim),
            }
        inputs: dict[str, Any] = {n: grad(*s, device=device) for n, s in shapes.items()}
        if choice["form"] == "interleaved":
            whole = torch.randn(shapes["query"][0], 3, heads, dim, device=device)
            parts = (whole[:, i].requires_grad_() for i in range(3))
            inputs = dict(zip(inputs, parts, strict=True))
        inputs |= _masks(choice, sequences, heads, queries, keys, shapes["query"][:-1], device)
        if choice["key_lengths"]:
            some = [max(1, 2 * n // 3) if i else n for i, (_, n) in enumerate(lengths)]
            inputs["key_lengths"] = torch.tensor(some, device=device)
        keep = None
        if choice["dropout"]:
            from fusedformer_kernels.rows.dropout import dropout_mask

            settings["dropout_p"] = P
            torch.manual_seed(11)
            seed = torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)
            keep = dropout_mask(seed, P, sequences * heads, queries, keys, True)
            keep = keep.view(sequences, heads, queries, keys)
        return Call(choice, lengths, inputs, settings, keep)

    def starts(self) -> dict[str, Any]:
        """Where the packed sequences begin."""
        device = self.inputs["query"].device
        found: dict[str, Any] = {}
        for side, lengths in zip("qk", zip(*self.lengths, strict=True), strict=True):
            starts = [0, *itertools.accumulate(lengths)]
            found[f"cu_seqlens_{side}"] = torch.tensor(starts, dtype=torch.int32, device=device)
            found[f"max_seqlen_{side}"] = max(lengths)
        return found

    def ours(self, **inputs: Any) -> Any:
        """The public function, kernels."""
        torch.manual_seed(11)
        also = self.choice["also"]
        asked: dict[str, Any] = {"return_lse": "lse" in also}
        if self.choice["form"] == "padded":
            if set(also) & {"weights", "averaged"}:
                asked["return_weights"] = "per_head" if "weights" in also else "averaged"
            return functional.scaled_dot_product_attention(**inputs, **self.settings, **asked)
        if self.choice["form"] == "nested":
            return self._nested(inputs, asked)
        return functional.varlen_attention(**inputs, **self.starts(), **self.settings, **asked)

    def _nested(self, inputs: dict[str, Any], asked: dict[str, Any]) -> Any:
        inputs = dict(inputs)
        starts = self.starts()
        queries = starts["cu_seqlens_q"].long()
        keys = starts["cu_seqlens_k"].long()
        for name, offsets in (("query", queries), ("key", keys), ("value", keys)):
            jagged = torch.nested.nested_tensor_from_jagged(inputs[name], offsets)
            inputs[name] = jagged.transpose(1, 2)
        result = functional.scaled_dot_product_attention(**inputs, **self.settings, **asked)
        nested = result[0] if isinstance(result, tuple) else result
        assert nested.shape[:2] == (len(self.lengths), 2)
        values = nested.transpose(1, 2).values()
        return (values, result[1]) if isinstance(result, tuple) else values

    def definition(self, **inputs: Any) -> list[Tensor]:
        """The reference, in whatever dtype the inputs have."""
        settings = {**self.settings, "keep": self.keep}
        also = self.choice["also"]
        if self.choice["form"] == "padded":
            outputs = list(reference.scaled_dot_product_attention(**inputs, **settings))
        else:
            outputs = list(reference.varlen_attention(**inputs, **self.starts(), **settings))
        if "lse" not in also:
            outputs.pop()
        if set(also) & {"weights", "averaged"}:
            inputs.pop("value")
            average = "averaged" in also
            outputs.append(reference.attention_weights(**inputs, **settings, average=average))
        return outputs

    def stock(self, **inputs: Any) -> Any:
        """ATen's composition; with dropout, whose mask it would draw itself, the definition."""
        if self.keep is not None:
            wide = {
                n: t.float() if isinstance(t, Tensor) and t.is_floating_point() else t
                for n, t in inputs.items()
            }
            dtype = inputs["query"].dtype
            first, *others = self.definition(**wide)
            if self.choice["also"] == ("lse",):
                return [first.to(dtype), *others]
            return [first.to(dtype), *(t.to(dtype) for t in others)]
        with backend("torch"):
            return self.ours(**inputs)

    def check(self) -> None:
        """Outputs and every gradient by the parity criterion."""
        few = {
            f"grad of {name}"
            for name in ("alibi_slopes", "relative_bias", "sinks")
            if name in self.inputs and self.inputs[name].numel() <= FEW
        }
        found = self.judged(seed=0)
        faults = {c.name: c.fault for c in found if c.fault and c.name not in few}
        for seed in (1, 2):  # of hundreds of cases stock is lucky in one: a fault outlives a draw
            if faults:
                again = {c.name for c in self.judged(seed) if c.fault}
                faults = {name: fault for name, fault in faults.items() if name in again}
        assert not faults, faults
        for name in {c.name for c in found if c.fault}:
            draws = [c for seed in range(5) for c in self.judged(seed) if c.name == name]
            assert is_right_over(draws, self.choice["dtype"]), draws

    def judged(self, seed: int) -> list[Comparison]:
        """All comparisons, with output gradients of this seed."""
        dtype = self.choice["dtype"]
        return parity(
            self.ours, self.stock, self.definition, self.inputs, dtype=dtype, seed=0x5EED + seed
        )


def _masks(
    choice: Combination,
    sequences: int,
    heads: int,
    queries: int,
    keys: int,
    rows: tuple[int, ...],
    device: str,
) -> dict[str, Any]:
    """Masks, slopes, table and gate as the combination says; ``rows`` is the gate's shape."""
    found: dict[str, Any] = {}
    shapes = {
        "boolean": (1, 1, queries, keys), "boolean keys": (sequences, 1, 1, keys),
        "additive": (queries, keys), "additive per head": (sequences, heads, queries, keys),
        "additive keys": (sequences, 1, 1, keys),
    }  # fmt: skip
    kind = choice["mask"]
    if kind is not None:
        drawn = torch.randn(shapes[kind], device=device)
        found["attn_mask"] = drawn > -0.5 if "boolean" in kind else drawn.requires_grad_()
    if choice["key_mask"]:
        found["key_mask"] = torch.rand(sequences, keys, device=device) > 0.3
    if choice["alibi_slopes"] is not None:
        shape = (heads,) if choice["alibi_slopes"] == "heads" else (sequences, heads)
        found["alibi_slopes"] = torch.rand(shape, device=device).requires_grad_()
    if choice["relative_bias"] is not None:
        gated = choice["relative_bias"] == "gated"
        radius = 20 if gated else choice["relative_bias"]
        found["relative_bias"] = grad(heads, 2 * radius + 1, device=device)
        if gated:
            found["relative_bias_gate"] = grad(*rows, device=device)
    if choice["sinks"]:
        found["sinks"] = grad(heads, device=device)
    return found
