"""Share between packages: checks of arguments, autocast, backend, tracing; tables and pages."""
