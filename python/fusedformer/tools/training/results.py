"""Write the results of a run: figures as JSON, the loss curve, the model for transformers."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fusedformer.models import BertEncoderModel, GPTDecoderModel
from fusedformer.tools.environment import describe
from fusedformer.tools.training.tasks import Task
from fusedformer.tools.training.trainer import OURS, STOCK, Trainer

_COLOURS = {OURS: "#2563eb", STOCK: "#94a3b8"}
_TYPES = {
    BertEncoderModel: ("bert", "BertForPreTraining"), GPTDecoderModel: ("gpt2", "GPT2LMHeadModel")
}  # fmt: skip


def figures(
    trainer: Trainer, source: dict[str, Any], baselines: dict[str, float], examples: list[str]
) -> dict[str, Any]:
    """Collect all that was measured, as JSON takes it.

    Args:
        source: of the text: where it is from, how much it is.
        baselines: of the task.
        examples: of the task, after training.
    """
    report = trainer.report()
    return {
        "schema": 1,
        **describe(trainer.device),
        "settings": dataclasses.asdict(trainer.settings),
        "text": source,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "steps": trainer.steps_done,
        "tokens_per_second": trainer.tokens_per_second(),
        "ms_per_step": {name: run.milliseconds() for name, run in trainer.runs.items()},
        "baselines": baselines,
        "evaluations": trainer.evaluations,
        "losses": {name: run.losses for name, run in trainer.runs.items()},
        "parity": None if report is None else report.as_dict(),
        "examples": examples,
    }


def write_figures(folder: Path, found: dict[str, Any]) -> Path:
    """Write ``metrics.json`` into ``folder``."""
    path = folder / "metrics.json"
    path.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
    return path


def draw(found: dict[str, Any], chance: str, path: Path) -> None:
    """Draw the smoothed losses of ours and of stock, that of held-out text, and baselines."""
    from fusedformer._internal.figures import drawn

    with drawn(path) as axis:
        for name in (STOCK, OURS):
            losses = found["losses"].get(name)
            if losses:
                # Stock's line is wider and below, so that both show where they agree.
                axis.plot(
                    range(1, len(losses) + 1), smoothed(losses), color=_COLOURS[name], label=name,
                    linewidth=5.0 if name == STOCK else 1.6,
                )  # fmt: skip
        steps, values = zip(*((one["step"], one["loss"]) for one in found["evaluations"]),
                            strict=True)  # fmt: skip
        axis.plot(steps, values, "o", color="#0f172a", markersize=4, label="held-out text")
        value = found["baselines"][chance]
        axis.axhline(value, color="#dc2626", linestyle="--", linewidth=1.2, label=chance)
        axis.set_title(found["settings"]["objective"])
        axis.set_xlabel("step")
        axis.set_ylabel("loss, nats")
        axis.legend()


def smoothed(losses: Sequence[float]) -> list[float]:
    """Average each loss with those before it, over up to a fiftieth of all."""
    width = max(1, len(losses) // 50)
    return [statistics.fmean(losses[max(0, i + 1 - width) : i + 1]) for i in range(len(losses))]


def export(folder: Path, model: Any, task: Task) -> list[Path]:
    """Write weights by Hugging Face's names, and the tokenizer, if transformers has the model.

    ``transformers.AutoModelForPreTraining.from_pretrained(folder)`` and, of the causal one,
    ``AutoModelForCausalLM``, load it.
    """
    if type(model) not in _TYPES:
        return []
    from safetensors.torch import save_file

    kind, architecture = _TYPES[type(model)]
    files = [folder / name for name in ("model.safetensors", "config.json", "tokenizer.json")]
    tied = set(model._tied())
    weights = model.to_huggingface_state_dict()
    alone = {  # safetensors takes no views
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in weights.items()
        if name not in tied
    }
    save_file(alone, files[0], metadata={"format": "pt"})
    config = dataclasses.asdict(model.config)
    config |= {"model_type": kind, "architectures": [architecture]}
    files[1].write_text(json.dumps(config, indent=1) + "\n")
    task.tokenizer.save(str(files[2]))
    return files


def rows(found: dict[str, Any], chance: str) -> list[list[str]]:
    """Return names and values of the table that a run ends with."""
    last = found["evaluations"][-1]
    body = [["held-out " + name, f"{value:.4g}"] for name, value in last.items() if name != "step"]
    body += [[name, f"{v:.4g}"] for name, v in found["baselines"].items()]
    margin = found["baselines"][chance] - last["loss"]
    body.append([f"held-out loss below {chance}", f"{margin:.4g} nats"])
    body.append(["tokens/s", f"{found['tokens_per_second']:.0f}"])
    ours = found["ms_per_step"][OURS]["median"]
    for name, times in found["ms_per_step"].items():
        ratio = "" if name == OURS else f" ({times['median'] / ours:.2f}x)"
        body.append([f"ms a step, {name}", f"{times['median']:.1f}{ratio}"])
    return body
