"""How much of a cache group stays at which similarity threshold: what calibration measures, and the ladder made of it.

Models differ in how alike a layer's keys are. Where a bias of the key projection gives all of them one direction
(Qwen2), cosines lie within 1e-4 of 1, and a fixed step of the threshold takes a layer from nothing merged to
everything. So thresholds are spaced by their distance from 1, and a ladder by the share of slots that its levels keep.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from semkv_deploy.methods.calibration import Settings

THRESHOLDS = (
    *(round(1 - 10.0 ** (power / 4), 8) for power in range(-24, -8)),
    *(round(1 - 0.01 * 80 ** (step / 20), 8) for step in range(21)),
)
"""Of the curve, falling: from 1 - 1e-6, four a decade to 0.99, and on to 0.2."""

LEVELS = 24
"""Of a ladder."""


class ThresholdCurve(Settings):
    """Share of slots that each cache group keeps by threshold, on the calibration text.

    A group's keys decide how much merges at a threshold, and groups differ widely.

    Attributes:
        tokens: length of the text.
        thresholds: of the curve, falling.
        kept: `[groups][thresholds]` shares, falling.
    """

    tokens: int
    thresholds: tuple[float, ...]
    kept: tuple[tuple[float, ...], ...]

    def ladder(self, group: int, share: float) -> list[float]:
        """A group's thresholds, tried in order until what is kept fits, to keep `share` of the slots that may merge.

        The first keeps slightly too much on the calibration text, and each keeps a little less than the one before, so
        that the first that fits leaves few slots unused. Later compressions meet cores, which are less alike than
        tokens: further down the steps grow, and below the curve thresholds fall to where everything near merges.
        """
        kept = np.array(self.kept[group])
        wanted = share * ladder_shares()
        # Thresholds are interpolated by the logarithm of their distance from 1.
        distance = np.log10(1 - np.array(self.thresholds))
        # np.interp wants rising abscissae.
        ladder = 1 - 10 ** np.interp(wanted, kept[::-1], distance[::-1])
        beyond = np.cumsum(wanted < kept[-1])
        ladder = np.maximum(ladder - BELOW_STEP * beyond, -1.0)
        return [round(float(threshold), 8) for threshold in np.minimum.accumulate(ladder)]

    def kept_at(self, group: int, threshold: float) -> float:
        """The share that a group keeps at a threshold."""
        distance = np.log10(1 - np.array(self.thresholds))
        return float(np.interp(np.log10(max(1 - threshold, 1e-12)), distance, self.kept[group]))


FIRST_SHARE = 1.02
"""Of the share wanted, what the first level keeps on the calibration text."""

SHARE_STEP = 0.95
"""Of what a level keeps, what the next one keeps, over the first `EVEN_LEVELS`; then each step grows."""

EVEN_LEVELS = 3

BELOW_STEP = 0.05
"""By how much thresholds fall where even the curve's lowest keeps more than is wanted."""


def ladder_shares() -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """`[LEVELS]` what levels keep on the calibration text, as shares of what is wanted."""
    level = np.arange(LEVELS)
    return FIRST_SHARE * SHARE_STEP ** (level + np.maximum(level - EVEN_LEVELS, 0) ** 2 / 8)


def measure(kept_at: Callable[[float], float]) -> tuple[float, ...]:
    """The curve of one group: shares kept at `THRESHOLDS`.

    Args:
        kept_at: clusters the text at a threshold. It is not asked between two thresholds that keep the same.
    """
    last = len(THRESHOLDS) - 1
    kept = {0: kept_at(THRESHOLDS[0]), last: kept_at(THRESHOLDS[last])}

    def fill(first: int, end: int) -> None:
        middle = (first + end) // 2
        if middle == first:
            return
        kept[middle] = kept[first] if kept[first] == kept[end] else kept_at(THRESHOLDS[middle])
        fill(first, middle)
        fill(middle, end)

    fill(0, last)
    # Greedy clusters are not quite monotone in the threshold.
    shares = np.minimum.accumulate([kept[number] for number in range(len(THRESHOLDS))])
    return tuple(round(float(share), 4) for share in shares)
