"""When two runs of a scenario agree: tolerances, and the first thing that differs.

One comparison function for Polygraphy's `Comparator.compare_accuracy`. Where it is exact it is exact: lengths, levels
and chosen slots are integers, and a slot that stands for another token is a failure, however small the cause.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from polygraphy.comparator import BaseCompareFunc, CompareResult, Threshold
from pydantic import BaseModel

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Tolerance(BaseModel):
    """What two runs may differ by.

    Attributes:
        logits: largest absolute difference of a logit; None: not compared one by one.
        cache: largest absolute difference of a live slot's key or value; None: caches and slots are not compared.
        bias: the same of a slot's bias.
        kl: largest mean KL (nats) of the next-token distribution until something is compressed; None: not bounded.
        why: what makes the numbers what they are.
    """

    logits: float | None
    cache: float | None
    bias: float | None
    kl: float | None
    why: str

    @property
    def exact_slots(self) -> bool:
        """Whether lengths, levels, evictions and chosen slots must be equal."""
        return self.cache is not None


TOLERANCES: dict[str, Tolerance] = {
    "same arithmetic": Tolerance(
        logits=0.0, cache=0.0, bias=0.0, kl=None, why="the same kernels in place and copying: bit for bit"
    ),
    "same weights, float32": Tolerance(
        logits=2e-3, cache=2e-3, bias=1e-4, kl=None, why="float32 sums in another order; slots exact"
    ),
    "as shipped": Tolerance(
        logits=None,
        cache=None,
        bias=None,
        kl=0.05,
        why="activations rounded to 8 bits or float16 may tip a near tie between clusters, after which caches differ "
        "rightly: bounded until the first compression; the same graph is checked in float32 beside it",
    ),
}
"""By kind of check; the one place where tolerances are."""


@dataclass(frozen=True)
class Difference(Threshold):
    """The largest absolute difference that passes."""

    tolerance: float | None

    METRIC_FIELDS = ("max_absdiff",)

    def passed(self, metric_values: Any) -> bool:
        value = metric_values["max_absdiff"]
        return self.tolerance is None or bool(value <= self.tolerance)


class OutputDifference(CompareResult):
    """How one output of two runs differs.

    Attributes:
        max_absdiff: NaN counts as infinite.
        where: index of the first element beyond the tolerance; None: there is none.
        reference, got: the two values there.
    """

    _THRESHOLD_CLASS = Difference

    def __init__(
        self, max_absdiff: float, thresholds: Any = None, where: tuple[int, ...] | None = None, pair: Any = (None, None)
    ) -> None:
        super().__init__(thresholds=thresholds)
        self.max_absdiff = max_absdiff
        self.where = where
        self.reference, self.got = pair


class CompareState(BaseCompareFunc):
    """Compares two runners' outputs of one event; results in the order in which a cause shows first.

    Args:
        tolerance: what may differ.
    """

    _RESULT_CLASS = OutputDifference

    def __init__(self, tolerance: Tolerance) -> None:
        self.tolerance = tolerance

    def thresholds_for(self, output_name: str) -> Difference:
        kind = output_name.split(".")[0]
        if kind in ("logits", "inner_logits"):
            return Difference(self.tolerance.logits)
        if kind == "position":
            return Difference(0.0)
        if kind in ("key", "value"):
            return Difference(self.tolerance.cache)
        if kind == "slot_bias":
            return Difference(self.tolerance.bias)
        return Difference(0.0 if self.tolerance.exact_slots else None)

    def __call__(self, iter_result0: Any, iter_result1: Any) -> OrderedDict[str, OutputDifference]:
        results: OrderedDict[str, OutputDifference] = OrderedDict()
        for name, reference in iter_result0.items():
            threshold = self.thresholds_for(name)
            result = difference(reference, iter_result1[name], threshold.tolerance)
            result.set_thresholds(threshold)
            result.output0_name = result.output1_name = name
            results[name] = result
        return results


def difference(reference: NDArray[Any], got: NDArray[Any], tolerance: float | None) -> OutputDifference:
    """How two arrays of one shape differ, and the first element (in memory order) beyond the tolerance."""
    if reference.dtype.kind == "f" or got.dtype.kind == "f":
        reference, got = np.asarray(reference, np.float32), np.asarray(got, np.float32)
    if np.array_equal(reference, got):
        return OutputDifference(0.0)
    with np.errstate(invalid="ignore"):
        apart = np.abs(reference - got).astype(np.float64)
    # Equal infinities differ by nothing; NaN anywhere is as far away as can be.
    apart[reference == got] = 0.0
    apart[np.isnan(apart)] = np.inf
    beyond = np.flatnonzero(apart.ravel() > (tolerance or 0.0))
    where = None
    if len(beyond) and tolerance is not None:
        where = tuple(int(i) for i in np.unravel_index(beyond[0], apart.shape))
    pair = (reference[where].item(), got[where].item()) if where is not None else (None, None)
    return OutputDifference(float(apart.max()), where=where, pair=pair)


def live_rows(cache: NDArray[Any], length: NDArray[np.int64]) -> NDArray[np.float32]:
    """A cache `[B,H,C,D]` in float32 with its dead rows zeroed (whatever they hold means nothing)."""
    result = np.zeros(cache.shape, np.float32)
    for row, live in enumerate(length):
        result[row, :, :live] = cache[row, :, :live]
    return result


def kl(reference: NDArray[np.float32], got: NDArray[np.float32]) -> list[float]:
    """KL(reference || got) in nats for each row that is not all zeros; logits `[B,V]`."""
    from semkv_deploy.calibrate import mean_kl

    rows = np.flatnonzero(np.any(reference != 0, axis=-1))
    return [mean_kl(reference[row : row + 1], got[row : row + 1]) for row in rows]
