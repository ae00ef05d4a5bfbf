"""Run the command line: ``python -m fusedformer COMMAND``."""

from __future__ import annotations

import argparse
import importlib
import sys

from fusedformer._version import __version__

COMMANDS = {
    "pretrain": "BERT, GPT or CLIP on text that is here, beside the same model of torch's modules",
    "finetune": "a pretrained model learns to tell packages apart: whole, frozen, by a prefix",
    "fewshot": "a small decoder learns to do what examples in its prompt say",
    "embed": "vectors of texts by a model of sentence-transformers",
    "report": "stock against fused on a pretrained encoder and real text",
    "parity": "every op, or a fused model, against float64, beside stock PyTorch",
    "bench": "the library's speed beside its peers' (in a checkout)",
    "tune": "tile configs for the GPU that is here",
    "compile-report": "every kernel compiled for GPUs that need not be here",
}

# The modules of commands that are not ``tools.<name>``.
MODULES = {
    "pretrain": "tools.training.pretrain",
    "finetune": "tools.training.finetune",
    "fewshot": "tools.training.fewshot",
    "parity": "parity",
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; its module is imported only then. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="fusedformer",
        description="Fused Triton kernels for Transformer encoders.",
        epilog="\n".join(f"  {name:16}{text}" for name, text in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("command", choices=COMMANDS)
    words = sys.argv[1:] if argv is None else argv
    arguments = parser.parse_args(words[:1])  # what follows belongs to the command
    name = arguments.command.replace("-", "_")
    module = importlib.import_module("fusedformer." + MODULES.get(name, f"tools.{name}"))
    status: int = module.main(words[1:])
    return status


if __name__ == "__main__":
    sys.exit(main())
