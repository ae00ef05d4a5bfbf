"""The name that :mod:`fusedformer.tools.compile_report` had, and still answers to."""

import sys

from fusedformer.tools import compile_report

sys.modules[__name__] = compile_report
