"""What the benchmark suites share: cases, counting, checks, timing, records.

Importing this package puts the checkout's two source roots first on ``sys.path``, so that what is
measured is this checkout, installed or not.
"""

import os
import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]

for _root in (CHECKOUT / "kernels", CHECKOUT / "python"):
    if str(_root) not in sys.path:
        sys.path.insert(0, str(_root))

# torch's profiler, asked for peak memory on CPU, otherwise writes two lines for every use.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
