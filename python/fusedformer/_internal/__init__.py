"""What packages share: checks of arguments, autocast, backend, who looks on; tables and pages."""
