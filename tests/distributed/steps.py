"""A training step in one process and on several ranks, judged by the same criterion as all else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fusedformer.nn
from fusedformer.testing import compare_tensors

E, HIDDEN = 16, 24
Tensors = dict[str, Tensor]
_SEQUENCES = ("src", "tgt", "memory")


class Case(NamedTuple):
    """A model and a batch. Ranks get as many sequences each, but unequal numbers of tokens."""

    stack: str = "encoder"
    norm_first: bool = False
    padding: bool = True
    mask: bool = False  # of every head, which is not packed
    layers: int = 2
    heads: int = 4
    lengths: tuple[int, ...] = (7, 2, 5, 4, 1, 6, 3, 7)
    seed: int = 0

    def model(self, namespace: Any = fusedformer.nn, device: str = "cpu") -> torch.nn.Module:
        """A stack of layers, with a norm at the end if norms come first."""
        name = f"Transformer{self.stack.capitalize()}"
        layer = getattr(namespace, f"{name}Layer")(
            E,
            self.heads,
            HIDDEN,
            0.0,
            "gelu",
            batch_first=True,
            norm_first=self.norm_first,
            device=device,
        )
        norm = namespace.LayerNorm(E, device=device) if self.norm_first else None
        settings = {"enable_nested_tensor": False} if self.stack == "encoder" else {}
        made: torch.nn.Module = getattr(namespace, name)(layer, self.layers, norm, **settings)
        return made

    def weights(self) -> Tensors:
        """No bias is 0, no gain 1, no two layers are alike."""
        generator = torch.Generator().manual_seed(self.seed)
        shapes = {n: t.shape for n, t in self.model(device="meta").state_dict().items()}
        drawn = {n: 0.3 * torch.randn(shape, generator=generator) for n, shape in shapes.items()}
        return {n: 1.0 + t if "norm" in n and n.endswith("weight") else t for n, t in drawn.items()}

    def batch(self) -> Tensors:
        """The arguments of all ranks together, and ``dy``, the gradient of the output."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        n, longest = len(self.lengths), max(self.lengths)
        x, dy = torch.randn(2, n, longest, E, generator=generator)
        inputs = {"src": x, "dy": dy}
        if self.stack == "decoder":
            inputs = {"tgt": x, "memory": torch.randn(n, 5, E, generator=generator), "dy": dy}
        if self.mask:
            shape = n * self.heads, longest, longest
            mask = torch.randn(shape, generator=generator)
            inputs["mask" if "src" in inputs else "tgt_mask"] = mask
        if self.padding:
            padding = torch.arange(longest) >= torch.tensor(self.lengths)[:, None]
            inputs["src_key_padding_mask" if "src" in inputs else "tgt_key_padding_mask"] = padding
            dy.masked_fill_(padding[..., None], 0.0)  # stock computes padding; here it is 0
        return inputs


# The interpreter takes milliseconds for what a kernel takes microseconds for.
TINY = Case(layers=1, heads=2, lengths=(3, 1))


def whole(tensor: Any) -> Tensor:
    """Gather a DTensor."""
    full: Tensor = tensor.full_tensor()
    return full


def reset_parameters(model: torch.nn.Module) -> None:
    """Draw the parameters anew of every module that can."""

    def reset(module: Any) -> None:
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()

    model.apply(reset)


def part(inputs: Tensors, rank: int, size: int) -> Tensors:
    """The sequences of one rank of ``size``."""
    return {name: tensor.chunk(size)[rank] for name, tensor in inputs.items()}


def unread(inputs: Tensors) -> Tensors:
    """With NaN in the padding, which would show if it were computed and not packed away.

    Unless a mask says that it is not.
    """
    inputs = dict(inputs)
    for name in ("src", "tgt"):
        padding = inputs.get(f"{name}_key_padding_mask")
        if padding is not None and not {"mask", "tgt_mask"} & set(inputs):
            inputs[name] = inputs[name].masked_fill(padding[..., None], torch.nan)
    return inputs


def step(
    model: torch.nn.Module,
    inputs: Tensors,
    *,
    times: float = 1.0,
    whole: Callable[..., Any] = lambda tensor: tensor,
    update: bool = True,
) -> Tensors:
    """Output, gradients, those of sequences too, and the parameters after a step of AdamW.

    ``times`` is what the output's gradient is multiplied with: ranks whose gradients are averaged
    each give the sum of their own. ``whole`` makes a plain tensor of a parameter or gradient.
    Without ``update`` gradients accumulate.
    """
    arguments = {name: tensor.detach() for name, tensor in inputs.items()}
    dy = arguments.pop("dy")
    sequences = {n: t.requires_grad_() for n, t in arguments.items() if n in _SEQUENCES}
    # With a small eps a step is the sign of a gradient, of one that is nothing but error too.
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, eps=1.0)
    output = model(**arguments)
    output.backward(dy.to(output.dtype) * times)
    result = {"output": output.detach().masked_fill(dy == 0, 0.0)}
    named = [(n.removeprefix("module."), p) for n, p in model.named_parameters()]
    result |= {f"grad of {n}": t.grad / times for n, t in sequences.items() if t.grad is not None}
    result |= {f"grad of {n}": whole(p.grad).clone() for n, p in named}
    if update:
        optimizer.step()
    return result | {n: whole(p.detach()).clone() for n, p in named}


def single(case: Case, dtype: torch.dtype = torch.float32) -> Tensors:
    """Of torch's own modules on the whole batch, in one process."""
    model = case.model(torch.nn)
    model.load_state_dict(case.weights())
    inputs = {n: t.to(dtype) if t.is_floating_point() else t for n, t in case.batch().items()}
    return step(model.to(dtype), inputs)


def faults_of(case: Case, results: list[Tensors], stock: Tensors) -> list[str]:
    """Where ranks are further from the truth than the criterion allows beside stock."""
    truth = single(case, torch.float64)
    faults = []
    for rank, result in enumerate(results):
        assert set(result) == set(stock), set(result) ^ set(stock)
        found = (compare_tensors(n, result[n], stock[n], truth[n]) for n in stock)
        faults += [f"rank {rank}: {one.fault}" for one in found if one.fault]
    return faults


def joined(results: list[Tensors]) -> list[Tensors]:
    """Results of ranks that each have the output of their part of the batch: with all of it."""
    names = [n for n in results[0] if n == "output" or n.removeprefix("grad of ") in _SEQUENCES]
    of_all = {name: torch.cat([result[name] for result in results]) for name in names}
    return [{**result, **of_all} for result in results]


def judge(
    case: Case,
    run: Callable[[Case], list[Tensors]],
    stock: Callable[[Case], Tensors] = single,
) -> None:
    """Raise if what ``run`` gives by rank has faults, on three draws of weights and batch.

    Of dozens of tensors, some of a few elements, stock is lucky in one now and then. Luck ends with
    the draw, a fault does not.
    """
    for seed in (1, 2, 3):
        case = case._replace(seed=seed)
        faults = faults_of(case, run(case), stock(case))
        if not faults:
            return
    raise AssertionError("\n".join(faults))
