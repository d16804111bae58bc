"""Methods measured side by side, each in a process of its own, over one results folder.

A cell is mostly decoding a row, which a second thread makes little faster; a second process is another cell.
"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from typing import Any

from semkv_deploy.errors import SemkvError
from semkv_deploy.evaluate.run import Plan, Progress, evaluate
from semkv_deploy.targets.onnxruntime.threads import usable_cpus


def measure_side_by_side(plan: Plan, jobs: int, progress: Progress) -> None:
    """Measures what is missing of a plan, so that `evaluate` finds every cell.

    Args:
        jobs: processes, which share the threads; each takes the memory of an evaluation.

    Raises:
        SemkvError: as `evaluate`, of the first method that fails; cells that were measured stay.
    """
    # What the full cache says is what all are compared with, and the export is made once.
    for _ in evaluate(replace(plan, methods=()), progress):
        pass
    threads = max(1, (plan.threads or usable_cpus()) // jobs)
    plans = [replace(plan, methods=[entry], threads=threads) for entry in plan.methods]
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        running = {pool.submit(_measure, each): each.methods[0].text for each in plans}
        for done, future in enumerate(as_completed(running), 1):
            failure = future.result()
            if failure is not None:
                pool.shutdown(cancel_futures=True)
                raise SemkvError(**failure)
            progress(f"{running[future]}: measured", done / len(plans))


def _measure(plan: Plan) -> dict[str, Any] | None:
    """Measures a plan in this process; returns an error's parts, for errors with parts do not travel."""
    try:
        for _ in evaluate(plan):
            pass
    except SemkvError as error:
        return {name: value if value is None else str(value) for name, value in vars(error).items()}
    return None
