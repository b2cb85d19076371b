"""Round to nearest."""

from __future__ import annotations

from plquant.block_module import BlockModule


class RTN(BlockModule):
    """Rounds every weight to the nearest code: nothing is learned, and the calibration text only measures.

    Args:
        block: The block to calibrate.
    """
