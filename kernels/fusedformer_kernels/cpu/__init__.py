"""Attention on a CPU in C++, which is compiled where it runs, for the processor that is there."""
