"""Read the settings of a run: all that its result depends on."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from typing import Any

from fusedformer.tools.training.text import LEAST_VOCABULARY

# By objective: steps, for minutes on two cores, and the largest learning rate.
DEFAULTS = {"mlm+nsp": (2500, 3e-3), "causal": (1000, 1e-3), "contrastive": (400, 1e-3)}
_FIRST = "mlm+nsp"
STEPS, RATES = (", ".join(map(str, column)) for column in zip(*DEFAULTS.values(), strict=True))


@dataclass(frozen=True)
class Settings:
    """The settings of a pretraining run, which by default takes minutes on two cores.

    Raises:
        ValueError: a value out of range, or two that exclude each other.
    """

    objective: str = dataclasses.field(
        default=_FIRST, metadata={"choices": tuple(DEFAULTS), "help": "what is learned"}
    )
    text: str | None = dataclasses.field(
        default=None,
        metadata={
            "metavar": "DIR",
            "help": "folder of .py (their docstrings), .txt, .md and .rst files "
            "(default: the docstrings of Python's standard library)",
        },
    )
    steps: int = dataclasses.field(
        default=DEFAULTS[_FIRST][0],
        metadata={"help": f"of the optimizer, in all (default: by objective, {STEPS})"},
    )
    batch_tokens: int = dataclasses.field(
        default=4096, metadata={"help": "tokens of a batch, at most (not contrastive)"}
    )
    pairs: int = dataclasses.field(default=128, metadata={"help": "pairs of a batch (contrastive)"})
    length: int = dataclasses.field(default=128, metadata={"help": "tokens of a sequence, at most"})
    vocab_size: int = dataclasses.field(default=4096, metadata={"help": "of the tokenizer"})
    width: int = dataclasses.field(default=128, metadata={"help": "of the hidden states"})
    layers: int = dataclasses.field(default=4, metadata={"help": "of the encoder"})
    heads: int = dataclasses.field(default=4, metadata={"help": "of attention"})
    dropout: float = dataclasses.field(default=0.0, metadata={"help": "of all kinds"})
    lr: float = dataclasses.field(
        default=DEFAULTS[_FIRST][1],
        metadata={
            "help": "largest learning rate, reached after a tenth of the steps "
            f"(default: by objective, {RATES})"
        },
    )
    seed: int = dataclasses.field(default=0, metadata={"help": "of all that is drawn"})
    amp: bool = dataclasses.field(
        default=False, metadata={"help": "bfloat16 autocast; weights stay in float32"}
    )
    stock: bool = dataclasses.field(
        default=False,
        metadata={
            "help": "train the same model of torch's modules too, on the same batches, and compare "
            "loss curves and times"
        },
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and field.name != "seed" and value < 1:
                raise ValueError(f"expected {option(field.name)} to be positive, but got {value}")
            choices = field.metadata.get("choices", (value,))
            if value not in choices:
                raise ValueError(
                    f"expected {option(field.name)} to be one of {choices}, but got {value!r}"
                )
        if self.width % self.heads:
            raise ValueError(
                f"expected --heads to divide --width {self.width}, but got {self.heads}"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"expected --dropout to be in [0, 1), but got {self.dropout}")
        if not self.lr > 0.0:
            raise ValueError(f"expected --lr to be positive, but got {self.lr}")
        if self.vocab_size < LEAST_VOCABULARY:
            raise ValueError(
                f"expected --vocab-size to be at least {LEAST_VOCABULARY}, bytes and special "
                f"tokens, but got {self.vocab_size}"
            )
        if self.length < 8:
            raise ValueError(f"expected --length to be at least 8, but got {self.length}")
        if self.batch_tokens < 2 * self.length:
            raise ValueError(
                f"expected --batch-tokens to be at least twice --length {self.length}, "
                f"but got {self.batch_tokens}"
            )
        if self.objective == "contrastive" and self.pairs < 2:
            raise ValueError(f"expected --pairs to be at least 2, but got {self.pairs}")
        if self.stock and self.dropout:
            raise ValueError(
                "expected --dropout 0 with --stock, as torch's modules would drop other elements, "
                f"but got {self.dropout}"
            )


def option(name: str) -> str:
    """Name the option of a field."""
    return "--" + name.replace("_", "-")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add an option for each field; those not given are left out of the parsed result."""
    for field in dataclasses.fields(Settings):
        given: dict[str, Any] = dict(field.metadata)
        if field.type == "bool":
            given["action"] = "store_true"
        else:
            given["type"] = {"int": int, "float": float}.get(str(field.type), str)
            if field.default is not None and "(default" not in given["help"]:
                given["help"] += f" (default: {field.default})"
        parser.add_argument(option(field.name), default=argparse.SUPPRESS, **given)


def given_settings(parsed: argparse.Namespace) -> dict[str, Any]:
    """Return the fields that the command line names."""
    names = [field.name for field in dataclasses.fields(Settings)]
    return {name: value for name, value in vars(parsed).items() if name in names}


def new(given: dict[str, Any]) -> Settings:
    """Make the settings of a new run."""
    objective = given.get("objective", Settings.objective)
    return Settings(**dict(zip(("steps", "lr"), DEFAULTS[objective], strict=True)) | given)


def resumed(saved: dict[str, Any], given: dict[str, Any]) -> Settings:
    """Return the settings of a saved run, which must not change when it is resumed.

    Raises:
        ValueError: ``given`` differs from them.
    """
    other = [name for name, value in given.items() if saved[name] != value]
    if other:
        found = ", ".join(f"{option(n)} {given[n]} (the run has {saved[n]})" for n in other)
        raise ValueError(f"a run goes on as it was begun, but got {found}")
    return Settings(**saved)
