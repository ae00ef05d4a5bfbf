"""Import :mod:`fusedformer.tools.tune` under its old name."""

import sys

from fusedformer.tools import tune

sys.modules[__name__] = tune
