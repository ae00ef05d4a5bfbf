"""The name that :mod:`fusedformer.tools.training` had, and still answers to."""

import sys

from fusedformer.tools import training

sys.modules[__name__] = training
