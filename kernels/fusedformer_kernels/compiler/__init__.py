"""Compile ahead of time, and read registers, waits, products and times from machine code."""
