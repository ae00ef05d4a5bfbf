"""Compilation ahead of time, and what machine code says of registers, waits, products and time."""
