"""What a validation found, as data: the report that `reports/validate.json` holds."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from semkv_deploy.validate.bisect import Bisection
from semkv_deploy.validate.compare import TOLERANCES, Tolerance


class Failure(BaseModel):
    """The first thing that differed.

    Attributes:
        event: name of the event, such as "turn 2 step 3".
        tensor: output of `runner.StatefulRunner`, or "greedy token", "next-token distribution".
        where: index of the first element that differs, for tensors.
        reference, got: the values there.
        max_absdiff, tolerance: of the whole tensor.
        message: what the target said when it raised instead.
    """

    model_config = ConfigDict(ser_json_inf_nan="strings")

    event: str
    tensor: str
    where: tuple[int, ...] | None = None
    reference: float | None = None
    got: float | None = None
    max_absdiff: float | None = None
    tolerance: float | None = None
    message: str | None = None

    def sentence(self) -> str:
        if self.message is not None:
            return f"{self.event}: {self.message}"
        place = f"[{', '.join(map(str, self.where))}]" if self.where is not None else ""
        values = f": {self.got:g}, expected {self.reference:g}" if self.got is not None else ""
        limit = f", tolerance {self.tolerance:g}" if self.tolerance is not None else ""
        apart = f" (at most {self.max_absdiff:.3g} apart{limit})" if self.max_absdiff else ""
        return f"{self.event}: {self.tensor}{place} differs{values}{apart}"


class CheckResult(BaseModel):
    """What one check gave.

    Attributes:
        status: "skipped" says in `detail` why it was not run.
        detail: one sentence.
        ran: files that were run; "" where nothing was.
        max_absdiff: of logits, key, value and slot_bias over the whole scenario (up to the failure).
        greedy_same, greedy_total: next tokens chosen alike, and chosen in all.
        slots_same: share of live slots that stand for the same token.
        ties: layers in which a choice of slots tipped, proved to be a near tie (see `ties`).
        mean_kl: nats per next-token distribution, over the whole scenario.
        first_kl: the same until something was compressed.
        compressions, evicted: of the target.
        seconds: that the target's own graphs took.
    """

    model_config = ConfigDict(ser_json_inf_nan="strings")

    target: str
    budget: float
    name: str
    status: Literal["passed", "failed", "skipped"]
    detail: str
    ran: str = ""
    against: str | None = None
    tolerance: str | None = None
    batch: int | None = None
    events: int = 0
    tokens: int = 0
    compressions: int = 0
    evicted: int = 0
    max_absdiff: dict[str, float] = {}
    greedy_same: int = 0
    greedy_total: int = 0
    slots_same: float | None = None
    ties: int = 0
    mean_kl: float | None = None
    first_kl: float | None = None
    seconds: float = 0.0
    failure: Failure | None = None
    bisection: Bisection | None = None

    def sentence(self) -> str:
        """The failure, and where it began."""
        where = f"{self.target} {self.name}, budget {self.budget:g}: {self.detail}"
        return f"{where}; {self.bisection.sentence()}" if self.bisection else where


class Report(BaseModel):
    """All checks of a bundle, as `reports/validate.json` holds them.

    Attributes:
        polygraphy: command lines that run the same files in stock Polygraphy, in the bundle's directory.
    """

    bundle: str
    model: str
    method: str
    reference: str = "portable graphs (function bodies, float32) in ONNX Runtime, caches copied"
    tolerances: dict[str, Tolerance] = TOLERANCES
    versions: dict[str, str]
    results: list[CheckResult]
    polygraphy: list[str] = []

    @property
    def passed(self) -> bool:
        """Whether nothing failed and something was compared."""
        return not any(result.status == "failed" for result in self.results) and any(r.events for r in self.results)
