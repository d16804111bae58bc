"""Threads of a session are at rest between runs."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from semkv_deploy import open_bundle, open_session

WAITED, MOST = 0.05, 0.01
"""Seconds without a run, and seconds of processor time that they may take."""


def test_no_thread_takes_a_processor_while_nothing_runs(tiny_bundle: Path):
    """ONNX Runtime's would wait in a loop for what may come: the other core's groups then take twice as long."""
    session = open_session(open_bundle(tiny_bundle), budget=0.5, threads=2)
    session.prefill(np.arange(4, 204))
    taken = []
    for token in range(5):
        session.step([token + 4])
        before = time.process_time()
        time.sleep(WAITED)
        taken.append(time.process_time() - before)
    assert sorted(taken)[2] < MOST
