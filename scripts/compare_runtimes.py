"""Times decode steps of libsemkv and of Python's session on one bundle, in turn, and says whether their tokens agree.

scripts/build_runtime.sh --driver
python scripts/compare_runtimes.py bundle/ --budget 0.2 --context 1000

Both run the same library of ONNX Runtime with as many threads. What is timed is a greedy step as a host sees it: the
model, and what the session does around it. A step without the model's share is told by a tiny model.
"""

from __future__ import annotations

import glob
import subprocess
import time
from pathlib import Path

import click
import numpy as np

from semkv_deploy import open_bundle, open_session
from semkv_deploy.targets.onnxruntime.native import LIBRARY

DRIVER = Path(__file__).resolve().parent.parent / "build" / "runtime" / "semkv_driver"


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--budget", type=float, help="One that was built; default: the smallest.")
@click.option("--context", default=1000, help="Tokens before the first step.")
@click.option("--steps", default=64, help="Steps in a round.")
@click.option("--rounds", default=3, help="Rounds of each, in turn.")
@click.option("--batch", default=1, help="Rows.")
@click.option("--threads", default=1, help="Threads of the runtime.")
def main(bundle: Path, budget: float | None, context: int, steps: int, rounds: int, batch: int, threads: int) -> None:
    """Prints the lower quartile of a decode step of both, in milliseconds, in the better of their rounds."""
    import onnxruntime

    (library,) = glob.glob(str(Path(onnxruntime.__file__).parent / "capi" / "libonnxruntime.so*"))
    opened = open_bundle(bundle)
    prompt = np.random.default_rng(0).integers(2, opened.manifest.model.vocab_size, context).tolist()
    session = open_session(opened, budget=budget, batch=batch, threads=threads)
    ours, theirs, same = [], [], True
    for _ in range(rounds):
        session.reset()
        tokens = session.prefill([prompt] * batch).argmax(-1)
        times, chosen = [], []
        for _ in range(steps):
            chosen.append(int(tokens[0]))
            start = time.perf_counter()
            tokens = session.step(tokens).argmax(-1)
            times.append(1e3 * (time.perf_counter() - start))
        theirs.append(float(np.quantile(times, 0.25)))
        command = [DRIVER, "bench", bundle, library, session.contract.budget, batch, threads, steps]
        command += [LIBRARY] if session.contract.native else []
        done = subprocess.run(
            [str(each) for each in command],
            input=" ".join(map(str, prompt)),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise click.ClickException(done.stderr)
        quartile, *generated = done.stdout.split()
        ours.append(float(quartile))
        same = same and [int(word) for word in generated] == chosen
    click.echo(
        f"{bundle} budget {session.contract.budget:g}, {batch} rows, {threads} threads, after {context} tokens: "
        f"C++ {min(ours):.3f} ms, Python {min(theirs):.3f} ms a step, "
        f"{'the same' if same else 'OTHER'} tokens"
    )


if __name__ == "__main__":
    main()
