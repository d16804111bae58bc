"""A session of libsemkv takes no more memory than the plan says."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from semkv_deploy.bundle import Bundle
from semkv_deploy.compiler.pipeline import build_bundle
from semkv_deploy.memory.estimate import make_plan
from semkv_deploy.methods import SemantiCache
from tests.memory.models import CONTEXT, LARGE, exported
from tests.runtime_cpp.driver import Driver

OPTIONS = {"method": SemantiCache(), "max_context": CONTEXT, "weights": "fp32", "native": "off"}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Bundle:
    folder = exported(tmp_path_factory.mktemp("memory"), tiny_checkpoint, **LARGE)
    text = "The sky is blue because air scatters short waves more than long ones. " * 20
    decoder = folder / "export" / "decoder.onnx"
    return build_bundle(str(decoder), folder / "bundle", budgets=[0.25, 1.0], calibration_text=text, **OPTIONS)


def anonymous(process: int) -> int:
    line = next(line for line in Path(f"/proc/{process}/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


@pytest.mark.parametrize(("budget", "batch", "tokens"), [(0.25, 1, 1500), (0.25, 3, 1150), (1.0, 3, 150)])
def test_a_session_takes_what_the_plan_says(driver: Path, bundle: Bundle, budget: float, batch: int, tokens: int):
    """All of the process, which the plan of a Python process counts nothing of: weights, caches, compressions."""
    source = bundle.root.parent / "export" / "decoder.onnx"
    (planned,) = make_plan(str(source), budgets=[budget], batches=[batch], **OPTIONS).rows
    allowed = max(planned.total_bytes, planned.load_bytes)
    random, seen, done = np.random.default_rng(0), [0], threading.Event()
    with Driver(driver) as session:

        def watch() -> None:
            while not done.wait(0.005):
                seen.append(anonymous(session._process.pid))

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            session.open(bundle.root, batch=batch, budget=budget, threads=2)
            ids = session.prefill(random.integers(2, 8000, (batch, tokens)).tolist()).argmax(-1)
            for _ in range(4):
                ids = session.step(ids.tolist()).argmax(-1)
        finally:
            done.set()
            thread.join()
    assert allowed / 2 < max(seen) <= 1.05 * allowed, planned
