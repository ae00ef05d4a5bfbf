"""Import :mod:`fusedformer.tools.bench` under its old name."""

import sys

from fusedformer.tools import bench

sys.modules[__name__] = bench
