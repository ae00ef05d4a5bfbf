"""Every architecture of transformers that can be built small: fused beside stock.

``architecture_table.py`` looks at all of them, ``test_architectures.py`` at a third.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import multiprocessing
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from tests.fusion.small_models import padded, runnable
from torch import Tensor, nn
from transformers import PreTrainedConfig

import fusedformer
from fusedformer.testing import compare

HERE = Path(__file__).parent
BUILDABLE = HERE / "architectures.json"
SIDES = "right", "left", "middle"
SECONDS = 90


class Found(NamedTuple):
    """What became of a type: its level, what is wrong, and what could not be looked at."""

    level: str
    faults: list[str]
    notes: list[str]


def examine(model_type: str, recipe: list[int]) -> Found:
    """Build it as the recipe says, fuse it, and compare all there is with stock."""
    model, inputs = runnable(model_type, recipe)
    notes: list[str] = []
    cases = _cases(model, inputs, notes)
    if not cases:
        return Found("-", [], notes)
    stock = copy.deepcopy(model)
    before, kept = _state(model), [_bits(model, given) for given in cases.values()]
    try:
        report = fusedformer.fuse(model)
    except Exception as error:
        return Found("-", [f"fuse: {told(error)}"], notes)
    level, faults = _level(report), []
    faults += _calls(model, report, next(iter(cases.values())))
    for name, given in cases.items():
        faults += _tried(name, functools.partial(_differences, model, stock, given, notes))
    first = next(iter(cases.values()))
    faults += _tried("pickle", lambda: _pickled(model, stock, cases, notes))
    left = report.left
    faults += _tried("output_attentions", lambda: _attentions(model, stock, first, left, notes))
    faults += _tried("hook", lambda: _hooked(model, stock, first, notes))
    faults += _tried("unfuse", lambda: _unfused(model, before, kept, cases))
    return Found(level, faults, sorted(set(notes)))


def told(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def _tried(name: str, check: Callable[[], list[str]]) -> list[str]:
    try:
        return [f"{name}: {fault}" for fault in check()]
    except TimeoutError:
        raise
    except Exception as error:
        return [f"{name}: {told(error)}"]


def _level(report: Any) -> str:
    def some(test: Callable[[Any], bool]) -> bool:
        return any(map(test, report.replaced))

    attends = some(lambda one: one.before.endswith(" attention"))
    norms = some(lambda one: "Norm" in one.before)
    if some(lambda one: one.after.startswith("packed")):
        return "A" if some(lambda one: "four fused steps" in one.after) else "B"
    return ("C" if norms else "D") if attends else "E" if norms else "-"


# ---- running


def run(model: Any, inputs: dict[str, Any], **kwargs: Any) -> dict[str, Tensor]:
    """Every tensor of floats in the output, by name; whatever draws, draws the same."""
    torch.manual_seed(0)
    _seed_numpy()
    return dict(_flat("", model(**inputs, **kwargs)))


def _seed_numpy() -> None:
    import random

    import numpy

    numpy.random.seed(0)
    random.seed(0)


def _flat(name: str, output: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(output, Tensor):
        if output.is_floating_point() and output.dim():
            yield name.strip("."), output
    elif hasattr(output, "items"):
        for key, value in output.items():
            if "past_key_values" not in str(key):
                yield from _flat(f"{name}.{key}", value)
    elif isinstance(output, (tuple, list)):
        for i, value in enumerate(output):
            yield from _flat(f"{name}.{i}", value)


def _bits(model: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
    with torch.no_grad():
        return run(model, inputs)


class _Real:
    """Picks what stock computes without regard to what stands in the padding."""

    def __init__(self, model: Any, inputs: dict[str, Any]) -> None:
        mask = inputs.get("attention_mask")
        self.mask = None if mask is None else mask.bool()
        self.steady: dict[str, Tensor] = {}
        if self.mask is not None and not bool(self.mask.all()) and "input_ids" in inputs:
            ids = inputs["input_ids"]
            other = {**inputs, "input_ids": torch.where(self.mask, ids, ids[0, -1:] - 1)}
            a, b = _bits(model, inputs), _bits(model, other)
            for name in a.keys() & b.keys():
                if a[name].shape == b[name].shape:
                    close = torch.isclose(a[name], b[name], 1e-4, 1e-6, equal_nan=True)
                    self.steady[name] = close.flatten(2).all(-1) if close.dim() > 2 else close

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        if self.mask is None or bool(self.mask.all()):
            return tensor
        if tensor.shape[:2] == self.mask.shape:
            return tensor[self.mask]
        return tensor[self.steady[name]] if name in self.steady else tensor


def _cases(model: Any, inputs: dict[str, Any], notes: list[str]) -> dict[str, dict[str, Any]]:
    """The inputs that stock computes, twice the same, and finite."""
    sides = SIDES if "attention_mask" in inputs and "input_ids" in inputs else ()
    tried = {**{side: padded(inputs, side) for side in sides}, "unpadded": inputs}
    found = {}
    for name, given in tried.items():
        try:
            first, again = _bits(model, given), _bits(model, given)
            real = _Real(model, given)
            finite = all(bool(real(n, x).isfinite().all()) for n, x in first.items())
        except TimeoutError:
            raise
        except Exception as error:
            notes.append(f"stock can't, {name}: {told(error)}")
            continue
        if not first:
            notes.append("its output has no floats")
        elif not finite:
            notes.append(f"stock isn't finite, {name}")
        elif not _equal(first, again):
            notes.append("stock isn't the same twice")
        else:
            found[name] = given
    return found


def _equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[n].shape == b[n].shape and bool(((a[n] == b[n]) | (a[n].isnan() & b[n].isnan())).all())
        for n in a
    )


# ---- comparing


def _judged(
    name: str, ours: Tensor, stock: Tensor, truth: Tensor | None, largest: float
) -> list[str]:
    """By the project's criterion, loosened for tens of thousands of tensors that are drawn once.

    An error of sixteen times stock's, or of float32's rounding of the largest of its kind, is luck.
    """
    if ours.shape != stock.shape:
        return [f"{name}: shape {tuple(ours.shape)}, but stock has {tuple(stock.shape)}"]
    if truth is None:
        error = (ours - stock).abs().max().item() if ours.numel() else 0.0
        limit = 1e-4 * stock.abs().max().item() + 1e-6 * largest if ours.numel() else 0.0
        told = "stock (no float64)"
    else:
        found = compare(name, ours, stock, truth)
        if found.passed:
            return []
        error, told = found.error, "float64"
        limit = 16 * found.stock_error + 32 * torch.finfo(torch.float32).eps * largest
    if error <= limit:
        return []
    return [f"{name}: off by {error:.2g} of {largest:.2g} from {told}"]


def _compared(
    ours: dict[str, Tensor], stock: dict[str, Tensor], truth: dict[str, Tensor] | None
) -> list[str]:
    if ours.keys() != stock.keys():
        return [f"other outputs: {sorted(ours.keys() ^ stock.keys())[:4]}"]
    largest = max((x.abs().max().item() for x in stock.values() if x.numel()), default=0.0)
    faults = []
    for name in stock:
        of_kind = largest
        if not name.startswith("grad of") and stock[name].numel():
            of_kind = stock[name].abs().max().item()
        true = None if truth is None else truth.get(name)
        faults += _judged(name, ours[name], stock[name], true, of_kind)
    return faults[:2] + ([f"and {len(faults) - 2} more"] if len(faults) > 2 else [])


def _gradients(model: Any, outputs: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    roots = {n: x for n, x in outputs.items() if x.requires_grad and x.numel()}
    dys = [torch.randn(x.shape, generator=draw).to(x) for x in roots.values()]
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(
        list(roots.values()), list(parameters.values()), dys, allow_unused=True
    )
    return {f"grad of {n}": g for n, g in zip(parameters, grads, strict=True) if g is not None}


def _differences(model: Any, stock: Any, inputs: dict[str, Any], notes: list[str]) -> list[str]:
    """Outputs and gradients of all parameters, at real positions."""
    real = _Real(stock, inputs)

    def both(module: Any, given: dict[str, Any], backwards: bool) -> tuple[Any, Any]:
        outputs = {n: real(n, x) for n, x in run(module, given).items()}
        grads = _gradients(module, outputs, 1) if backwards else {}
        return {n: x.detach() for n, x in outputs.items()}, grads

    backwards = True
    try:
        wanted = both(stock, inputs, True)
    except TimeoutError:
        raise
    except Exception as error:
        notes.append(f"stock has no gradients: {told(error)}")
        backwards, wanted = False, both(stock, inputs, False)
    truth: Any = None, None
    try:
        wide = {n: x.double() if _is_float(x) else x for n, x in inputs.items()}
        with contextlib.redirect_stderr(None):
            truth = both(copy.deepcopy(stock).double(), wide, backwards)
        wide_ones = [x for kind in truth for x in kind.values()]
        if not all(x.dtype == torch.float64 and x.isfinite().all() for x in wide_ones):
            truth = None, None
    except TimeoutError:
        raise
    except Exception:
        truth = None, None
    if truth[0] is None:
        notes.append("stock doesn't run in float64")
    found = both(model, inputs, backwards)
    if not any(x.numel() for x in wanted[0].values()):
        return ["nothing to compare"]
    faults = []
    kinds = "outputs", "gradients"
    for kind, ours, theirs, true in zip(kinds, found, wanted, truth, strict=True):
        zeros = {n: torch.zeros_like(x) for n, x in theirs.items()}
        if not _compared(zeros, theirs, true):  # stock is too far from float64 to be judged by it
            true = None
        faults += _compared(ours, theirs, true)
        if zeros and not _compared(zeros, theirs, true):
            faults.append(f"{kind} of zeros would pass")
    return faults


def _is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _calls(model: Any, report: Any, inputs: dict[str, Any]) -> list[str]:
    """Attention that is reported as replaced is called, if the model that has it is."""
    paths = [one.path for one in report.replaced if one.before.endswith(" attention")]
    called: list[Any] = []
    used: list[bool] = []
    with contextlib.ExitStack() as stack:
        for path in paths:
            hook = model.get_submodule(path).register_forward_hook(lambda *_: used.append(True))
            stack.callback(hook.remove)
        for name in ("scaled_dot_product_attention", "varlen_attention"):
            own = getattr(fusedformer.functional, name)

            def spy(*args: Any, own: Any = own, **kwargs: Any) -> Any:
                called.append(own)
                return own(*args, **kwargs)

            stack.enter_context(mock.patch.object(fusedformer.functional, name, spy))
        with contextlib.suppress(Exception):
            _bits(model, inputs)
        if used and not called:
            return ["attention is reported as replaced, but never called"]
    return []


def _attentions(
    model: Any, stock: Any, inputs: dict[str, Any], left: Any, notes: list[str]
) -> list[str]:
    """The weights that the eager model returns, where they are numbers."""
    try:
        eager = copy.deepcopy(stock)
        eager.set_attn_implementation("eager")
        with torch.no_grad():
            wanted = run(eager, inputs, output_attentions=True)
    except TimeoutError:
        raise
    except Exception as error:
        notes.append(f"stock can't return attention's weights: {told(error)}")
        return []
    mask = inputs.get("attention_mask")

    def weights(found: dict[str, Tensor]) -> dict[str, Tensor]:
        picked = {}
        for name, x in found.items():
            if "attentions" in name:
                if mask is not None and x.dim() == 4 and x.shape[2] == mask.shape[1]:
                    x = x.transpose(1, 2)[mask.bool()]
                if x.isfinite().all() or name in finite:
                    picked[name] = x
        return picked

    with torch.no_grad():
        found = run(model, inputs, output_attentions=True)
    finite: set[str] = set()
    wanted = weights(wanted)
    finite |= wanted.keys()
    found = {n: x for n, x in weights(found).items() if n in wanted}
    if any("attention" in one.reason.lower() for one in left):  # what is left returns what it did
        wanted = {n: x for n, x in wanted.items() if n in found}
    if not wanted:
        notes.append("stock returns no weights of attention")
        return []
    return _compared(found, wanted, None)


def _hooked(model: Any, stock: Any, inputs: dict[str, Any], notes: list[str]) -> list[str]:
    """A hook on a module inside a layer changes the batch's second row."""
    called: list[str] = []
    rows = next(x.shape[0] for x in inputs.values() if isinstance(x, Tensor))
    handles = [
        module.register_forward_hook(
            lambda m, args, out, path=path: called.append(path)
            if isinstance(out, Tensor) and out.dim() == 3 and out.shape[0] == rows else None
        )
        for path, module in stock.named_modules()
        if any(part.isdigit() for part in path.split(".")) and not any(module.children())
        and not path.rsplit(".", 1)[-1].isdigit()
    ]  # fmt: skip
    _bits(stock, inputs)
    for handle in handles:
        handle.remove()
    if not called:
        notes.append("no module inside a layer to hook")
        return []
    path = called[len(called) // 2]

    def twice(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        changed = output.clone()
        changed[1] *= 2
        return changed

    real, results = _Real(stock, inputs), []
    for one in (model, stock):
        handle = one.get_submodule(path).register_forward_hook(twice)
        try:
            results.append({n: real(n, x) for n, x in _bits(one, inputs).items()})
        finally:
            handle.remove()
    ours, theirs = results
    return [f"on {path}, {fault}" for fault in _compared(ours, theirs, None)]


# ---- in another process


def serve(requests: Any) -> None:
    """Load models that were saved whole and send their outputs, in a process that fuses none."""
    torch.set_num_threads(1)
    quiet()
    while True:
        path, cases = requests.recv()
        try:
            with fusedformer.backend("torch"):
                model = torch.load(path, weights_only=False)
                requests.send({name: _bits(model, given) for name, given in cases.items()})
        except Exception as error:
            requests.send(told(error))


@functools.cache
def _elsewhere() -> Any:
    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    context.Process(target=serve, args=(theirs,), daemon=True).start()
    return ours


def _pickled(model: Any, stock: Any, cases: dict[str, Any], notes: list[str]) -> list[str]:
    """The bits that it gives here; saving leaves it as it was."""
    try:
        torch.save(stock, io.BytesIO())
    except Exception as error:
        notes.append(f"stock can't be pickled: {told(error)}")
        return []
    with tempfile.TemporaryDirectory() as folder:
        torch.save(model, f"{folder}/model.pt")
        _elsewhere().send((f"{folder}/model.pt", cases))
        found = _elsewhere().recv()
    if isinstance(found, str):
        return [found]
    return [
        f"{name}, {fault}"
        for name, given in cases.items()
        for fault in _compared(found[name], _bits(model, given), None)
    ]


# ---- unfused


def _state(model: Any) -> dict[str, Any]:
    """Classes, and the attention of every configuration in it."""
    found: dict[str, Any] = {}

    def walk(where: str, config: Any) -> None:
        found[where] = config.__dict__.get("_attn_implementation_internal")
        for name, value in vars(config).items():
            if isinstance(value, PreTrainedConfig):
                walk(f"{where}.{name}", value)

    for path, module in model.named_modules():
        found[f"{path}: class"] = type(module)
        found[f"{path}: ours"] = [n for n in vars(module) if "fusedformer" in n]
        if isinstance(getattr(module, "config", None), PreTrainedConfig):
            walk(f"{path}: config", module.config)
            found[f"{path}: settings"] = module.config.to_dict()
    return found


def _unfused(
    model: Any, before: dict[str, Any], kept: list[dict[str, Tensor]], cases: dict[str, Any]
) -> list[str]:
    fusedformer.unfuse(model)
    after = _state(model)
    changed = [n for n in before if before[n] != after.get(n)]
    faults = [f"{n}: {after.get(n)}, but was {before[n]}"[:160] for n in changed[:2]]
    for (name, given), bits in zip(cases.items(), kept, strict=True):
        if not _equal(_bits(model, given), bits):
            faults.append(f"other bits than before, {name}")
    return faults


# ---- how it is run


def quiet() -> None:
    from transformers.utils import logging

    logging.set_verbosity(50)
    warnings.filterwarnings("ignore")


@contextlib.contextmanager
def deadline(seconds: int) -> Iterator[None]:
    def late(*_: Any) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


# Whose weights of attention differ, and why.
_SINKS = (
    "as stock; its weights of attention are those that values get, which sum to less than 1, where "
    "`eager` returns those before the sink takes its part"
)
KNOWN = {
    "granite_swa": _SINKS, "granitemoe_swa": _SINKS,
    "phi4_multimodal_vision": "as stock; its weights of attention are those of `sdpa`, which is "
    "causal here where nothing is padded, and not of `eager`, which is not",
}  # fmt: skip
