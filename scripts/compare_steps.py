"""Times decode steps of several bundles in one process, in turn, so that a machine's moods touch all of them alike.

python scripts/compare_steps.py bundle/ bundle-by-head/ --budget 1 --budget 0.2 --context 2000
"""

from __future__ import annotations

import time
from pathlib import Path

import click
import numpy as np

from semkv_deploy import open_bundle, open_session


@click.command()
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--budget", "budgets", multiple=True, type=float, default=[1.0], help="Budget of the bundles.")
@click.option("--context", default=2000, help="Tokens before the first step.")
@click.option("--steps", default=48, help="Steps timed.")
def main(bundles: tuple[Path, ...], budgets: tuple[float, ...], context: int, steps: int) -> None:
    """Prints the median and the lower quartile of a decode step, in milliseconds."""
    sessions = {}
    for path in bundles:
        bundle = open_bundle(path)
        ids = np.random.default_rng(0).integers(2, bundle.manifest.model.vocab_size, context).tolist()
        for budget in budgets:
            session = open_session(bundle, budget=budget)
            sessions[path, budget] = session, [session.prefill(ids)], []
    for _ in range(steps):
        for session, logits, times in sessions.values():
            tokens = logits[0].argmax(-1)
            start = time.perf_counter()
            logits[0] = session.step(tokens)
            times.append(1e3 * (time.perf_counter() - start))
    for (path, budget), (_, _, times) in sessions.items():
        click.echo(
            f"{path} budget {budget:g}: median {np.median(times):.3f} ms, quartile {np.quantile(times, 0.25):.3f}"
        )


if __name__ == "__main__":
    main()
