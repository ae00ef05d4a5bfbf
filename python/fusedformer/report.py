"""Import :mod:`fusedformer.tools.report` under its old name."""

import sys

from fusedformer.tools import report

sys.modules[__name__] = report
