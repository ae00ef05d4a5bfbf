"""The benchmark suites, in the order in which ``run.py`` takes them: nothing else lists them all.

``python benchmarks/harness/suites.py`` prints a line for each stage of ``gpu_check.sh``, the short
ones first, so that few are left when its minutes are over: name, seconds, arguments for ``run.py``.
"""

from typing import NamedTuple


class Stage(NamedTuple):
    """What ``gpu_check.sh`` gives a suite: at most so many seconds, and arguments of its own."""

    seconds: int
    arguments: str = ""


# torch.compile takes minutes for a whole model: pretraining alone has them, whose goal names it.
SUITES = {
    "softmax": Stage(40),
    "norm": Stage(60),
    "activation": Stage(30),
    "embedding": Stage(30),
    "steps": Stage(30),
    "losses": Stage(60),
    "contrastive": Stage(30),
    "attention": Stage(200),
    "disentangled": Stage(40),
    "encoder": Stage(90, "--compile none"),
    "graphs": Stage(90),
    "huggingface": Stage(150, "--compile none"),
    "serving": Stage(60),
    "pretraining": Stage(240),
    "host": Stage(20),
}


if __name__ == "__main__":
    for name, stage in sorted(SUITES.items(), key=lambda item: item[1].seconds):
        print(name, *stage)
