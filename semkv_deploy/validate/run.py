"""Validates a bundle: every target that can run here against the portable graphs, over three turns of conversation."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from polygraphy.comparator import Comparator
from polygraphy.logger import G_LOGGER

from semkv_deploy.bundle import Bundle
from semkv_deploy.errors import SemkvError
from semkv_deploy.validate import stock
from semkv_deploy.validate.bisect import Bisection, bisect
from semkv_deploy.validate.checks import Check, Graphs, checks, reference_graphs
from semkv_deploy.validate.compare import TOLERANCES, CompareState, Tolerance, kl
from semkv_deploy.validate.results import CheckResult, Failure, Report
from semkv_deploy.validate.runner import StatefulRunner
from semkv_deploy.validate.scenario import Event, Scenario, bundle_text, plan
from semkv_deploy.validate.ties import Ties

if TYPE_CHECKING:
    from semkv_deploy.budget_units import BudgetLike

Progress = Callable[[str, float | None], None]


def validate(
    root: Path | str,
    *,
    budgets: Sequence[BudgetLike] | None = None,
    targets: Sequence[str] | None = None,
    tokens: int | None = None,
    allow_plugins: bool = False,
    progress: Progress = lambda what, share: None,
) -> Report:
    """Validates the bundle at `root`, which is only read.

    Args:
        budgets: that were built; None: all.
        targets: that were built for; None: all.
        tokens: of a row at most; None: enough to overflow a modest capacity (`scenario.DEFAULT_TOKENS`).
        allow_plugins: let native code of plugins in the bundle's engines run.

    Raises:
        SemkvError: when the bundle is damaged or altered meanwhile, has no such budget or target, or the reference
            itself cannot run.
    """
    root = Path(root)
    bundle = Bundle.open(root, allow_plugins=allow_plugins)
    manifest = bundle.manifest
    names = list(targets) if targets else list(manifest.targets)
    for name in names:
        bundle.target(name)
    chosen = [bundle.share(budget) for budget in budgets] if budgets else manifest.budgets
    text = bundle_text(root)
    results: list[CheckResult] = []
    for target in names:
        for budget in chosen:
            with tempfile.TemporaryDirectory() as folder:
                found = checks(bundle, budget, target, Path(folder))
                results += _run(bundle, budget, target, text, found, tokens, progress)
    # Graphs were read by their paths: what was judged is what is there only if nobody changed it meanwhile.
    bundle.files.check()
    return Report(
        bundle=str(root),
        model=manifest.model.source,
        method=manifest.method.kind,
        versions=manifest.versions,
        results=results,
        polygraphy=[str(command) for command in stock.commands(bundle, chosen[0])],
    )


def _run(
    bundle: Bundle,
    budget: float,
    target: str,
    text: list[int],
    found: list[Check],
    tokens: int | None,
    progress: Progress,
) -> list[CheckResult]:
    """Results of one target's checks, in their order; a failure more where none of them compared anything."""
    results: dict[str, CheckResult] = {}
    groups: dict[tuple[Path | None, int], list[Check]] = {}
    for check in found:
        if check.graphs is not None:
            groups.setdefault((check.reference, check.batch), []).append(check)
        elif check.pair is None:
            status: Any = "failed" if check.failed else "skipped" if check.skipped else "passed"
            detail = check.failed or check.skipped or check.passed or ""
            results[check.name] = _result(check, budget, status=status, detail=detail)
    for (decoder, batch), group in groups.items():
        names = {check.name for check in group}
        group += [check for check in found if check.pair is not None and set(check.pair) <= names]
        reference = reference_graphs(bundle, budget).with_decoder(decoder)
        for check, result in _Comparison(text, reference, group, batch, tokens, progress).run():
            results[check.name] = result
    ordered = [results[check.name] for check in found if check.name in results]
    if not any(result.events or result.status == "failed" for result in ordered):
        reasons = "; ".join(f"{result.name} {result.detail}" for result in ordered if result.status == "skipped")
        nothing = Check(target, "comparison", failed=f"nothing was compared: {reasons}; build the bundle again")
        ordered.append(_result(nothing, budget, status="failed", detail=nothing.failed or ""))
    return ordered


class _Comparison:
    """One scenario, run by the reference and by every graph that is compared with it, event by event."""

    def __init__(
        self,
        text: list[int],
        reference: Graphs,
        group: list[Check],
        batch: int,
        tokens: int | None,
        progress: Progress,
    ) -> None:
        self._contract, self._graphs, self._group = reference.opened.contract, reference, group
        self._progress = progress
        self._scenario: Scenario = plan(text, self._contract, batch=batch, tokens=tokens)
        self._events: list[Event] = []
        self._reference = self._runner("reference", reference)
        self._runners = {
            check.name: self._runner(check.name, check.graphs, TOLERANCES[check.tolerance])
            for check in group
            if check.graphs
        }
        self._bisections: dict[Any, Bisection | None] = {}
        self._tallies = [_Tally(check) for check in group]

    def _runner(self, name: str, graphs: Graphs, tolerance: Tolerance | None = None) -> StatefulRunner:
        """The reference's runner, or that of a target which may differ from it within a tolerance."""
        batch = self._scenario.batch
        ties = None
        if tolerance is not None and tolerance.exact_slots and self._contract.compressors:
            ties = functools.partial(Ties, self._graphs.opened, tolerance)
        return StatefulRunner(
            name,
            lambda: graphs.open(batch),
            batch,
            reference=self._reference if tolerance is not None else None,
            ties=ties,
        )

    def _feeds(self) -> Iterator[dict[str, Any]]:
        expected = len(self._scenario.prompts) * (self._scenario.steps + 2)
        what = f"{self._group[0].target}, budget {self._contract.budget:g}"
        for event in self._scenario.events(self._reference.greedy):
            self._progress(what, len(self._events) / expected)
            self._events.append(event)
            yield event.feed()

    def run(self) -> Iterator[tuple[Check, CheckResult]]:
        runners = [self._reference, *self._runners.values()]
        with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
            for outputs in Comparator.run(runners, data_loader=self._feeds(), streaming=True):
                if self._reference.error is not None:
                    raise SemkvError(
                        f"the reference cannot be run: {self._reference.error}",
                        where=self._graphs.decoders[0].name,
                        fix="export and build the model again",
                    )
                for tally in self._tallies:
                    pair = tally.check.pair or ("reference", tally.check.name)
                    runner = self._runners[pair[1]]
                    tally.add(self._events[-1], outputs, pair, runner)
                    if tally.failure is not None and tally.check.pair is None:
                        runner.stopped = True
        for tally in self._tallies:
            yield tally.check, self._finish(tally)

    def _finish(self, tally: _Tally) -> CheckResult:
        check = tally.check
        result = tally.result(self._contract.budget)
        result.batch = self._scenario.batch
        result.tokens = self._scenario.tokens
        runner = self._runners.get(check.name)
        if runner is not None:
            result.seconds = round(runner.seconds, 3)
            result.ties = runner.ties
            if result.ties and result.status == "passed":
                result.detail += f", near ties between clusters proved and settled: {result.ties}"
        if result.status == "failed" and check.graphs is not None and tally.tolerance.cache is not None:
            # In place and copying that fail alike are one failure of one graph.
            failure = (check.graphs.decoders, tally.failing, tally.failure and tally.failure.sentence())
            if failure not in self._bisections:
                self._progress(f"bisecting {check.target} {check.name}", None)
                self._bisections[failure] = self._bisect(check.graphs, tally)
            result.bisection = self._bisections[failure]
        return result

    def _bisect(self, graphs: Graphs, tally: _Tally) -> Bisection | None:
        if tally.failing is None:
            return None
        try:
            return bisect(
                self._graphs,
                graphs,
                tolerance=tally.tolerance,
                events=self._events,
                failing=tally.failing,
            )
        except Exception as error:
            # A graph that cannot be run cannot be bisected either; the failure itself is reported all the same.
            message = str(error).splitlines()[0] if str(error) else type(error).__name__
            return Bisection(layer=None, what=f"could not be bisected: {message}")


class _Tally:
    """What one check has seen so far."""

    def __init__(self, check: Check) -> None:
        self.check, self.tolerance = check, TOLERANCES[check.tolerance]
        self.failure: Failure | None = None
        self.failing: int | None = None
        self.skipped: str | None = None
        self._compare = CompareState(self.tolerance)
        self._max: dict[str, float] = {}
        self._kl: list[float] = []
        self._first_kl: list[float] = []
        self._greedy = [0, 0]
        self._slots = [0, 0]
        self._events = self._compressions = self._evicted = 0

    def add(self, event: Event, outputs: Any, pair: tuple[str, str], runner: StatefulRunner) -> None:
        """Compares the outputs of an event, unless something failed before."""
        if self.failure is not None or self.skipped is not None:
            return
        results = {name: iterations[0] for name, iterations in outputs}
        reference, got = results[pair[0]], results[pair[1]]
        if not got or not reference:
            if self.check.pair is not None:
                self.skipped = "not compared to the end: one of the two runs failed"
            elif self.check.optional and self._events == 0:
                self.skipped = f"not run: {runner.error}"
            else:
                stopped = f"{runner.error or 'stopped, because its run failed'}"
                self._fail(Failure(event=event.name, tensor="", message=stopped))
            return
        # Called directly: `Comparator.compare_accuracy` also takes quantiles of every tensor, most of the time spent.
        differences = self._compare(reference, got)
        self._count(reference, got, differences)
        for name, found in differences.items():
            if not found:
                failure = Failure(
                    event=event.name,
                    tensor=name,
                    where=found.where,
                    reference=found.reference,
                    got=found.got,
                    max_absdiff=found.max_absdiff,
                    tolerance=found.thresholds.tolerance,
                )
                self._fail(failure)
                return
        if "logits" in reference:
            self._logits(event, reference["logits"], got["logits"])
        self._events += 1

    def _fail(self, failure: Failure) -> None:
        self.failure, self.failing = failure, self._events

    def _count(self, reference: Any, got: Any, differences: Any) -> None:
        for name, found in differences.items():
            kind = name.split(".")[0]
            kind = kind.removeprefix("inner_")
            if kind in ("logits", "key", "value", "slot_bias"):
                self._max[kind] = max(self._max.get(kind, 0.0), found.max_absdiff)
            if kind == "slot_position":
                live = reference[name] >= 0
                self._slots[0] += int((live & (reference[name] == got[name])).sum())
                self._slots[1] += int(live.sum())
        self._compressions += int(got["compressions"])
        self._evicted += int(got["evicted"].sum())

    def _logits(self, event: Event, reference: Any, got: Any) -> None:
        apart = kl(reference, got)
        self._kl += apart
        if not self._compare.compressed:
            self._first_kl += apart
        for row in np.flatnonzero(np.any(reference != 0, axis=-1)):
            expected, chosen = int(reference[row].argmax()), int(got[row].argmax())
            self._greedy[1] += 1
            self._greedy[0] += expected == chosen
            # Logits that agree within a tolerance can only choose differently where they are twice as close.
            gap = float(reference[row, expected] - reference[row, chosen])
            if self.tolerance.logits is not None and gap > 2 * self.tolerance.logits:
                place = (int(row),)
                self._fail(
                    Failure(event=event.name, tensor="greedy token", where=place, reference=expected, got=chosen)
                )
                return

    def result(self, budget: float) -> CheckResult:
        mean, first = (float(np.mean(values)) if values else None for values in (self._kl, self._first_kl))
        bounds = (("before any compression", first, self.tolerance.first_kl), ("all turns", mean, self.tolerance.kl))
        for when, value, bound in bounds:
            if self.failure is None and self.skipped is None and bound is not None and not (value or 0.0) <= bound:
                message = f"mean KL of the next-token distribution {value:.3g} (at most {bound:g})"
                self.failure = Failure(event=when, tensor="next-token distribution", message=message)
        status: Any = "skipped" if self.skipped else "failed" if self.failure else "passed"
        result = _result(self.check, budget, status=status, detail=self.skipped or "")
        result.against = self.check.pair[0] if self.check.pair else "reference"
        result.tolerance = self.check.tolerance
        result.events, result.compressions, result.evicted = self._events, self._compressions, self._evicted
        result.max_absdiff, result.failure = self._max, self.failure
        result.ran = self.check.ran
        result.mean_kl, result.first_kl = mean, first
        result.greedy_same, result.greedy_total = self._greedy
        result.slots_same = self._slots[0] / self._slots[1] if self._slots[1] else None
        if self.failure is not None:
            result.detail = self.failure.sentence()
        elif not self.skipped:
            result.detail = self._summary(result)
        return result

    def _summary(self, result: CheckResult) -> str:
        tokens = f"{result.greedy_same} of {result.greedy_total} greedy tokens alike"
        if self.tolerance.kl is not None:
            return (
                f"mean KL {result.first_kl:.2g} before any compression (at most {self.tolerance.first_kl:g}), "
                f"{result.mean_kl:.2g} in all (at most {self.tolerance.kl:g}), {tokens}"
            )
        apart = max(self._max.values(), default=0.0)
        return f"{apart:.2g} apart at most, {tokens}, {result.compressions} compressions"


def _result(check: Check, budget: float, *, status: Any, detail: str) -> CheckResult:
    return CheckResult(target=check.target, budget=budget, name=check.name, status=status, detail=detail)
