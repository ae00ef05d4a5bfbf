"""The name that :mod:`fusedformer.tools.report` had, and still answers to."""

import sys

from fusedformer.tools import report

sys.modules[__name__] = report
