"""Attention: ``arguments`` of a call, ``forward``, ``merge`` of parts, ``backward``, gradients.

``tiles`` has what kernels do with a tile of scores; ``schedule`` and ``mask_tiles`` say which tiles
there are.
"""
