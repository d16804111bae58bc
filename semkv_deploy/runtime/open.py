"""Opening a bundle to run it, and a session on one of its budgets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from semkv_deploy.bundle import Bundle
from semkv_deploy.errors import SemkvError
from semkv_deploy.runtime.session import Session
from semkv_deploy.targets import open_engine, require_runnable

if TYPE_CHECKING:
    from semkv_deploy.budget_units import BudgetLike
    from semkv_deploy.bundle import OpenedBudget


def open_bundle(root: Path | str, target: str = "onnxruntime-cpu", *, allow_plugins: bool = False) -> Bundle:
    """Opens a bundle to run it: verifies what the target runs; `Bundle.open` verifies everything.

    Args:
        allow_plugins: let native code of plugins in the bundle's engines run.
    """
    require_runnable(target)
    only = [f"targets/{target}/", "tokenizer/", "delimiters.json"]
    return Bundle.open(Path(root), only=only, allow_plugins=allow_plugins)


def open_session(
    bundle: Bundle,
    *,
    budget: BudgetLike | None = None,
    target: str = "onnxruntime-cpu",
    batch: int = 1,
    capacity: int | None = None,
    threads: int | None = None,
    in_place: bool = True,
    state: Path | str | None = None,
) -> Session:
    """A session with empty caches, or one that goes on where a saved one was.

    Files are verified again as they are read, so what runs is what the manifest lists.

    Args:
        budget: one that was built, as a share, slots or bytes; None: the smallest.
        batch: rows; of a TensorRT target those that were built for.
        capacity: slots that every cache group has at least, for a session that reads in more memory than the budget
            is: what it reads, it reads uncompressed as far as they go, `Session.compress` brings it to the budget, and
            what it saves then goes on in a session without. None: the budget's.
        threads, in_place: see `OnnxRuntimeEngine`.
        state: a file that `Session.save` wrote.

    Raises:
        SemkvError: when the bundle has no such target or budget, it does not run here, a file of it was altered, its
            caches do not fit in memory, the state is not its own, or its graphs have no other capacity.
    """
    built: OpenedBudget = bundle.built(target, budget)
    if capacity is not None:
        built = larger(built, capacity)
    try:
        session = Session(open_engine(built, batch=batch, threads=threads, in_place=in_place))
    except MemoryError:
        raise SemkvError(
            "the caches do not fit in memory",
            where=bundle.root,
            got=f"{batch} rows of {built.contract.capacity} slots",
            fix="open fewer rows, or a smaller budget",
        ) from None
    if state is not None:
        session.load(state)
    return session


def larger(built: OpenedBudget, capacity: int) -> OpenedBudget:
    """A budget whose caches are larger than it says; what it keeps when it compresses is the same.

    Raises:
        SemkvError: where shapes are static, or a table of blocks is of the budget's size, or for less than the budget's
            capacity.
    """
    contract = built.contract
    if contract.batch is not None:
        raise SemkvError(
            "graphs of static shapes have the capacity that they were built with",
            where="capacity",
            expected=f"none for {contract.target}",
            got=capacity,
            fix="read in a session of onnxruntime-cpu, or in one of a larger budget",
        )
    if contract.tables:
        raise SemkvError(
            "a table of blocks has the size that it was built with",
            where="capacity",
            expected="none for a method that chooses blocks",
            got=capacity,
            fix="build with a larger budget",
        )
    if capacity < contract.capacity:
        raise SemkvError(
            "less than the budget's", where="capacity", expected=f"{contract.capacity} slots or more", got=capacity
        )
    groups = tuple(group.model_copy(update={"capacity": capacity}) for group in contract.cache.groups)
    cache = contract.cache.model_copy(update={"groups": groups})
    return replace(built, contract=contract.model_copy(update={"cache": cache}))
