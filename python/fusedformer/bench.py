"""The name that :mod:`fusedformer.tools.bench` had, and still answers to."""

import sys

from fusedformer.tools import bench

sys.modules[__name__] = bench
