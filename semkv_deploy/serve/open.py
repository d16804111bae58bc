"""A scheduler over a bundle, for the fronts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from semkv_deploy.model.template import ChatTemplate
from semkv_deploy.runtime.conversation import ChatFormat
from semkv_deploy.runtime.open import open_bundle, open_session
from semkv_deploy.runtime.tokens import load_tokenizer
from semkv_deploy.serve.scheduler import Scheduler

if TYPE_CHECKING:
    from semkv_deploy.budget_units import BudgetLike
    from semkv_deploy.serve.table import OnFull


def open_scheduler(
    root: Path | str,
    *,
    budget: BudgetLike | None = None,
    target: str = "onnxruntime-cpu",
    rows: int = 4,
    threads: int | None = None,
    allow_plugins: bool = False,
    on_full: OnFull = "refuse",
    save_sessions: Path | None = None,
    idle_seconds: float = 600.0,
    wait_seconds: float = 0.0,
    max_waiting: int = 256,
    max_sessions: int = 1024,
) -> Scheduler:
    """A scheduler, not started, for sessions on one budget of a bundle.

    Args:
        budget, target, threads, allow_plugins: see `open_session` and `open_bundle`.
        rows: sessions that have caches at one time.
        save_sessions: save idle ones there when their row is wanted, whatever `on_full` is.

    Raises:
        SemkvError: as `open_session`; when the chat template has no end; when saved sessions are not the bundle's.
    """
    bundle = open_bundle(root, target, allow_plugins=allow_plugins)
    template = ChatTemplate.in_folder(bundle.root / "tokenizer")
    if template is not None:
        template.check_ends()
    session = open_session(bundle, budget=budget, target=target, batch=rows, threads=threads)
    tokenizer, model = load_tokenizer(bundle.root), bundle.manifest.model
    has_template = ChatTemplate.of(tokenizer) is not None
    return Scheduler(
        session,
        tokenizer,
        stop_ids=tuple(model.eos_token_ids),
        form=ChatFormat(tokenizer, model.eos_token_ids, model.vocab_size) if has_template else None,
        on_full=on_full if save_sessions is None else "save",
        folder=save_sessions,
        idle_seconds=idle_seconds,
        wait_seconds=wait_seconds,
        max_waiting=max_waiting,
        max_sessions=max_sessions,
    )
