"""The suites: each ``bench_<name>.py`` holds one ``SUITE``, its cases and its providers.

``harness/suites.py`` lists them; ``run.py`` and pytest-benchmark run them.
"""
