"""The name that :mod:`fusedformer.tools.tune` had, and still answers to."""

import sys

from fusedformer.tools import tune

sys.modules[__name__] = tune
