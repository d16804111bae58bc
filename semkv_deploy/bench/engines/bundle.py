"""A budget of a bundle."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from semkv_deploy.bench.engines.base import Rows, SteppingEngine
from semkv_deploy.sizes import row_bytes

if TYPE_CHECKING:
    from numpy.typing import NDArray


class BundleEngine(SteppingEngine):
    """A session.

    Args:
        path: the bundle.
        budget: a share that was built.
        batch: rows.
        threads: of ONNX Runtime.
        context: unused: the budget says how large the caches are.

    Raises:
        SemkvError: as `open_bundle` and `open_session`.
    """

    def __init__(
        self, path: str, target: str, budget: float, batch: int, threads: int, context: int, allow_plugins: bool
    ) -> None:
        from semkv_deploy.runtime.open import open_bundle, open_session

        bundle = open_bundle(Path(path), target, allow_plugins=allow_plugins)
        self._session = open_session(bundle, budget=budget, target=target, batch=batch, threads=threads)
        # Methods that choose blocks say how many slots a step attends to.
        self._width: int | None = getattr(bundle.manifest.method, "attend", None)
        # A GPU's memory is not the process's.
        self.memory_shows = not bundle.target(target).on_gpu

        self._next: NDArray[np.int64] | None = None

    def reset(self) -> None:
        self._session.reset()
        self._next = None

    def _append(self, rows: Rows) -> None:
        carried = [[]] * len(rows) if self._next is None else self._next[:, None].tolist()
        given = [[*token, *ids] for token, ids in zip(carried, rows, strict=True)]
        self._next = self._session.prefill(given).argmax(-1)

    def _step(self) -> None:
        assert self._next is not None
        self._next = self._session.step(self._next).argmax(-1)

    def end_turn(self) -> float:
        started = time.perf_counter()
        self._session.end_turn()
        return time.perf_counter() - started

    def facts(self) -> dict[str, Any]:
        session, contract = self._session, self._session.contract
        read = session.length
        if contract.tables and self._width is not None:
            # Chosen slots and its own.
            read = np.minimum(read, self._width + 1)
        heads = np.array([len(group.heads) for group in contract.cache.groups])
        rows = float((heads * read.sum(1)).sum())
        return {
            "live_slots": float(session.length.mean()),
            "cache_mib": session.engine.cache_bytes() / (1 << 20),
            "read_mib": rows * 2 * row_bytes(contract.dtype, contract.head_dim) / (1 << 20),
            "compress_s": session.stats.seconds,
            "compressions": session.stats.runs,
            "levels": {str(level): count for level, count in sorted(session.stats.levels.items())},
            "evicted": session.stats.evicted,
        }
