"""Import :mod:`fusedformer.tools.training` under its old name."""

import sys

from fusedformer.tools import training

sys.modules[__name__] = training
