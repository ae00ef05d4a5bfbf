"""Import :mod:`fusedformer.tools.compile_report` under its old name."""

import sys

from fusedformer.tools import compile_report

sys.modules[__name__] = compile_report
