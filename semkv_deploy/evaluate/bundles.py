"""Our methods, measured as they are deployed: in a session on a bundle that was built for the method and budget."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from semkv_deploy.budget import budget_profile
from semkv_deploy.budget_units import SLOT_MULTIPLE
from semkv_deploy.errors import SemkvError
from semkv_deploy.evaluate.entries import CALIBRATION_TEXT, Entry
from semkv_deploy.evaluate.subject import Kept
from semkv_deploy.evaluate.texts import read_bytes
from semkv_deploy.methods import DynSplitSelect
from semkv_deploy.methods.layout import BIAS, KEY_SCALE, VALUE_SCALE
from semkv_deploy.model.cache_groups import one_a_layer
from semkv_deploy.runtime.open import open_session
from semkv_deploy.runtime.sampling import Sampler

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from semkv_deploy.bundle import Bundle
    from semkv_deploy.model.config import ModelFacts

FLOAT32 = 4
LEAST_ATTENDED = 16
"""Slots that a step which chooses attends to at least."""

ELEMENT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "int64": 8}


def max_context(context: int, extra: int, model: ModelFacts) -> int:
    """What bundles are built for, so that a compression of `context` tokens keeps `budget x context`.

    A profile keeps three quarters of its capacity when it compresses; the rest is room for what comes next.

    Raises:
        SemkvError: when the model does not take as many tokens.
    """
    if context + extra > model.max_position:
        most = model.max_position - extra
        raise SemkvError("beyond the model", where="--context", expected=f"at most {most} tokens", got=context)
    needed = max(context + extra, math.ceil(context * 4 / 3))
    return min(-(-needed // SLOT_MULTIPLE) * SLOT_MULTIPLE, model.max_position)


def allowed_bytes(budget: float, tokens: int, longest: int, model: ModelFacts) -> int:
    """Bytes of cache that any method may keep of `tokens` tokens: those of our slots, biases included.

    Args:
        longest: what bundles are built for.
    """
    profile = budget_profile(budget, longest, bytes_per_slot=slot_bytes(model), groups=one_a_layer(1, 1))
    # One more than the share: where heads have capacities of their own, each rounds up.
    slots = min(math.ceil(budget * tokens) + 1, profile.keep_slots) if budget < 1 else tokens
    return slots * (slot_bytes(model) + FLOAT32 * model.layers * model.kv_heads)


def slot_bytes(model: ModelFacts) -> int:
    """Bytes of one token's float32 keys and values over all layers."""
    return model.model_copy(update={"dtype": "float32"}).cache_bytes_per_token


@contextmanager
def built(
    entry: Entry,
    decoder: Path,
    budgets: Sequence[float],
    longest: int,
    work: Path,
    progress: Callable[[str, float | None], None],
    *,
    context: int = 0,
) -> Iterator[Bundle]:
    """A bundle of one method at all budgets, with float32 weights: no loss but the method's. Gone after the block.

    Args:
        budgets: one for a method that keeps everything: what a step attends to is in its graph.
        work: the folder that it is built in.
        context: tokens that such a method's budget is a share of.
    """
    from semkv_deploy.compiler.pipeline import build_bundle

    options, method = entry.build_options, entry.method()
    if entry.chooses:
        (budget,) = budgets
        method = method.model_copy(update={"attend": max(math.ceil(budget * context), LEAST_ATTENDED)})
        budgets = [1.0]
    if entry.calibration_text is not None:
        options[CALIBRATION_TEXT] = read_bytes(entry.calibration_text, f"--method {entry.text}").decode("utf-8-sig")
    with tempfile.TemporaryDirectory(dir=work) as folder:
        yield build_bundle(
            decoder,
            Path(folder) / "bundle",
            budgets=budgets,
            method=method,
            max_context=longest,
            weights="fp32",
            # What runs must not depend on the machine; caches that are not float32 have no other form.
            native="off" if entry.cache_dtype == "float32" else "on",
            portable=False,
            progress=lambda what, share: progress(f"{entry.text}: {what}", share),
            **options,
        )


class BundleSubject:
    """A session of a bundle.

    Args:
        threads: of ONNX Runtime; None: all cores.
        blind: reads nothing: what the model says without context.
        hold_all: reads in a cache that holds everything, and goes on in one of the budget.
    """

    def __init__(
        self, bundle: Bundle, budget: float, *, threads: int | None = None, blind: bool = False, hold_all: bool = False
    ) -> None:
        method = bundle.manifest.method
        # A step attends to chosen slots, a prompt to all: what is followed goes in steps then.
        self._in_steps = method.selects
        self._attend: int | None = method.attend if isinstance(method, DynSplitSelect) else None
        if self._attend is not None:
            budget = 1.0
        self._session = self._reader = open_session(bundle, budget=budget, threads=threads)
        if hold_all:
            contract = self._session.contract
            # One piece more than can be read: methods that read again keep room for one.
            whole = contract.max_context + contract.prefill_chunk
            self._reader = open_session(bundle, budget=budget, threads=threads, capacity=whole)
        dtype = self._session.contract.dtype
        attention = "GroupQueryAttention" if dtype == "float32" else "native NexusAttention"
        self.backend = f"onnxruntime {attention}, {dtype}"
        self._has_bias = bundle.manifest.method.bias_mode != "none"
        self._blind = blind
        self._folder = tempfile.TemporaryDirectory()
        self._state = Path(self._folder.name) / "read.safetensors"
        self._fresh = False

    def read(self, turns: Sequence[Sequence[int]]) -> Kept:
        session = self._reader
        session.reset()
        if self._blind:
            self._fresh = True
            return Kept(0, 0.0)
        for turn in turns:
            session.prefill(list(turn))
            session.end_turn()
        session.compress()
        session.save(self._state)
        self._fresh = session is self._session
        live = session.length[:, 0]
        kept = self._bytes(live if self._attend is None else np.minimum(live, self._attend))
        return Kept(kept, kept / self._bytes(session.position[[0] * len(session.length)], "float32"))

    def _bytes(self, length: NDArray[np.int64], dtype: str | None = None) -> int:
        """Bytes of what the layout's buffers hold of so many slots of each group; those not of slots are scratch.

        Args:
            dtype: of keys and values; None: as they are.
        """
        contract, total = self._session.contract, 0
        dtype = dtype or contract.dtype
        for buffer in contract.cache.buffers:
            no_bias = buffer.name == BIAS.name and not self._has_bias
            no_scale = buffer in (KEY_SCALE, VALUE_SCALE) and dtype != "int8"
            if not buffer.has_slots or no_bias or no_scale:
                continue
            element = ELEMENT_BYTES[dtype if buffer.dtype == "T" else buffer.dtype]
            for group, live in zip(contract.cache.groups, length.tolist(), strict=True):
                sizes = buffer.sizes(group, batch=1, head_dim=contract.head_dim)
                names = buffer.shape.split(",")
                total += element * math.prod(
                    live if name == "C" else size for name, size in zip(names, sizes, strict=True)
                )
        return total

    def _rewind(self) -> None:
        """Back to what was read."""
        if not self._fresh:
            if self._blind:
                self._session.reset()
            else:
                self._session.load(self._state)
        self._fresh = False

    def follow(self, ids: Sequence[int]) -> NDArray[np.float32]:
        self._rewind()
        if self._in_steps:
            return np.stack([self._session.step([token])[0].copy() for token in ids])
        return self._session.prefill(list(ids), all_logits=True)

    def generate(self, ids: Sequence[int], count: int, *, stop: bool = True) -> list[int]:
        self._rewind()
        stops = self._session.contract.stop_ids if stop else ()
        return self._session.generate(list(ids), max_new_tokens=count, sampler=Sampler(), stop_ids=stops)[0]

    def close(self) -> None:
        del self._session, self._reader
        self._folder.cleanup()
