"""A scheduler over a bundle, for the fronts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from semkv_deploy.model.template import ChatTemplate
from semkv_deploy.runtime.conversation import ChatFormat
from semkv_deploy.runtime.open import open_bundle, open_session
from semkv_deploy.runtime.tokens import load_tokenizer
from semkv_deploy.serve.options import ServingOptions
from semkv_deploy.serve.scheduler import Scheduler

if TYPE_CHECKING:
    from semkv_deploy.budget_units import BudgetLike
    from semkv_deploy.serve.table import OnFull


def open_scheduler(
    root: Path | str,
    options: ServingOptions,
    *,
    budget: BudgetLike | None = None,
    target: str = "onnxruntime-cpu",
    allow_plugins: bool = False,
    on_full: OnFull = "refuse",
) -> Scheduler:
    """A scheduler, not started, for sessions on one budget of a bundle.

    Args:
        budget, target, allow_plugins: see `open_session` and `open_bundle`.
        on_full: see `OnFull`; idle sessions are saved wherever the options have a folder for them.

    Raises:
        SemkvError: as `open_session`; when the chat template has no end; when saved sessions are not the bundle's.
    """
    bundle = open_bundle(root, target, allow_plugins=allow_plugins)
    template = ChatTemplate.in_folder(bundle.root / "tokenizer")
    if template is not None:
        template.check_ends()
    session = open_session(bundle, budget=budget, target=target, batch=options.rows, threads=options.threads)
    tokenizer, model = load_tokenizer(bundle.root), bundle.manifest.model
    has_template = ChatTemplate.of(tokenizer) is not None
    return Scheduler(
        session,
        tokenizer,
        stop_ids=tuple(model.eos_token_ids),
        form=ChatFormat(tokenizer, model.eos_token_ids, model.vocab_size) if has_template else None,
        on_full=on_full if options.save_sessions is None else "save",
        folder=options.save_sessions,
        share_folder=options.share_sessions,
        idle_seconds=options.idle_seconds,
        wait_seconds=options.wait_seconds,
        max_waiting=options.max_waiting,
        max_sessions=options.max_sessions,
        max_new_tokens=options.max_tokens,
    )
