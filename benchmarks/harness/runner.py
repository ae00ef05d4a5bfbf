"""Runs a suite: for each case makes inputs, checks every provider, times those that passed."""

from __future__ import annotations

import gc
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from fusedformer.tools.measure import peak_memory
from harness import timing
from harness.case import REFERENCE, Case, Inputs, NotApplicable, Program, Provider, Suite
from harness.check import Checker, Verdict, reraise_if_device_is_lost, status_of
from harness.records import Record, ResultFile, rates


@dataclass
class Options:
    """What a run was asked for."""

    device: torch.device
    seconds: float  # of timing for each provider and direction
    compile: str = "none"  # peers that compile: in no case, in "headline" ones, in "all"
    deadline: float = math.inf  # by time.monotonic(): no case starts after it
    say: Callable[[str], None] = lambda line: print(line, flush=True)


@dataclass
class Contender:
    """A provider in one case: its program, and the reason why a direction can't be timed."""

    name: str
    program: Program | None = None
    verdicts: dict[str, Verdict] = field(default_factory=dict)


def run_suite(suite: Suite, cases: list[Case], results: ResultFile, options: Options) -> bool:
    """Measure ``cases``, headline cases first, into ``results``; False if time ran out."""
    if not cases:
        options.say(f"{suite.name}: nothing to measure with what is installed here")
    done = results.measured()
    todo = [case for case in cases if _key(case) not in done]
    todo.sort(key=lambda case: not case.headline)
    if len(todo) < len(cases):
        options.say(f"{suite.name}: {len(cases) - len(todo)} cases are measured already")
    providers = suite.providers(options.device, options.compile)
    for index, case in enumerate(todo):
        if time.monotonic() > options.deadline:
            options.say(f"{suite.name}: out of time, {len(todo) - index} cases not measured")
            return False
        began = time.monotonic()
        records = run_case(suite, case, providers, options)
        results.add(records)
        options.say(
            f"{suite.name} {index + 1}/{len(todo)}: {case.name} ({time.monotonic() - began:.1f} s)"
        )
        for line in summary_lines(records, results.document["ceilings"]):
            options.say("    " + line)
    return True


def run_case(
    suite: Suite, case: Case, providers: dict[str, Provider], options: Options
) -> list[Record]:
    """Make the records of one case: each provider and direction, timed or with the reason."""
    torch.manual_seed(0)
    _forget_compiled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SDPA warns at length why a forced backend declines
        inputs = case.make(options.device)
        contenders = check_all(suite, case, providers, inputs, options.device)
        records = []
        for direction in case.costs:
            records += _time_direction(suite, case, direction, contenders, inputs, options)
    return records


def check_all(
    suite: Suite, case: Case, providers: dict[str, Provider], inputs: Inputs, device: torch.device
) -> list[Contender]:
    """Build and check each provider; one that fails carries its reason instead of a time."""
    try:
        reference = providers[REFERENCE](case)
        checker = Checker(case, reference, suite.truth(case, device), inputs)
    except Exception as error:  # out of memory, say: nothing to judge by, so nothing is timed
        reraise_if_device_is_lost(error)
        verdict = Verdict("error", f"no reference: {status_of(error)[1]}")
        return [Contender(name, None, dict.fromkeys(case.costs, verdict)) for name in providers]
    contenders = []
    for name, build in providers.items():
        contender = Contender(name)
        try:
            contender.program = reference if name == REFERENCE else build(case)
            contender.verdicts = checker.judge(contender.program)
        except NotApplicable:
            continue
        except Exception as error:  # whatever a peer raises is its result, not the end of the run
            reraise_if_device_is_lost(error)
            contender.verdicts = dict.fromkeys(case.costs, Verdict(*status_of(error)))
        contenders.append(contender)
    return contenders


def _time_direction(
    suite: Suite,
    case: Case,
    direction: str,
    contenders: list[Contender],
    inputs: Inputs,
    options: Options,
) -> list[Record]:
    cost = case.costs[direction]
    records = {
        c.name: Record(
            case.suite,
            case.name,
            direction,
            str(case.dtype).removeprefix("torch."),
            c.name,
            cost.bytes,
            cost.flops,
            c.verdicts[direction].status,
            c.verdicts[direction].reason,
            case.headline,
            error_ratio=c.verdicts[direction].error_ratio,
            tokens=case.tokens,
        )
        for c in contenders
    }
    sets = [inputs]
    size = sum(t.nbytes for t in inputs.values() if isinstance(t, torch.Tensor))
    while len(sets) < timing.input_sets(size, options.device):
        sets.append(case.make(options.device))
    calls = {}
    for contender in contenders:
        record = records[contender.name]
        if record.status != "timed" or contender.program is None:
            continue
        try:
            prepared = prepared_calls(contender, direction, sets)
            prepared[0]()
            record.peak_memory_bytes = peak_memory(prepared[0], options.device)
            calls[contender.name] = prepared
        except Exception as error:
            reraise_if_device_is_lost(error)
            record.status, record.reason = status_of(error)
    try:
        measured = timing.CLOCKS[suite.clock](calls, options.device, options.seconds)
    except Exception as error:
        reraise_if_device_is_lost(error)
        measured = {}
        for name in calls:
            records[name].status, records[name].reason = status_of(error)
    for name, samples in measured.items():
        record = records[name]
        record.samples_us = [round(value, 3) for value in samples.samples_us]
        record.median_us = samples.median_us
        record.p20_us, record.p80_us = samples.percentile(0.2), samples.percentile(0.8)
        record.method = samples.method
    return list(records.values())


def prepared_calls(
    contender: Contender, direction: str, sets: list[Inputs]
) -> list[Callable[[], object]]:
    """Make the call of a direction for each set of inputs."""
    program = contender.program
    assert program is not None
    prepared = []
    for each in map(program.own, sets):
        grads = []
        if direction != "forward":
            with torch.no_grad():
                grads = [torch.randn_like(o) for o in program.outputs(each)]
        prepared.append(program.call(direction, each, grads))
    return prepared


def summary_lines(records: list[Record], ceilings: dict[str, Any]) -> list[str]:
    """Describe each provider and direction: time, rates, error beside the reference's."""
    lines = []
    for r in records:
        head = f"{r.direction:9}{r.provider:16}"
        if r.median_us is None:
            lines.append(f"{head}{r.status}: {r.reason.splitlines()[0][:90]}")
            continue
        rate = rates(vars(r), ceilings)
        tokens = "" if rate.tokens_s is None else f" {rate.tokens_s:10.0f} tokens/s"
        lines.append(
            f"{head}{r.median_us:11.1f} us {rate.gb_s:8.1f} GB/s {rate.tflop_s:8.3f} TFLOP/s"
            f" {rate.percent:6.1f}% of the {rate.bound} floor{tokens}"
        )
    return lines


def _key(case: Case) -> tuple[str, str, str]:
    return case.suite, case.name, str(case.dtype).removeprefix("torch.")


def _forget_compiled() -> None:
    """Clear compile caches: past eight shapes torch.compile quietly falls back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    torch._dynamo.reset()
    # Backward is timed with retain_graph, which donated buffers forbid.
    torch._functorch.config.donated_buffer = False
