"""The table: every method at every budget on every task, a cell at a time, each written as it comes.

Methods come one after the other, so that one engine is in memory at a time, and a bundle is built once for all of its
budgets. What was measured before is not measured again.
"""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from semkv_deploy.bundle import tool_versions
from semkv_deploy.errors import SemkvError
from semkv_deploy.evaluate.bundles import BundleSubject, allowed_bytes, built, max_context
from semkv_deploy.evaluate.entries import CALIBRATION_TEXT, FULL, NO_CONTEXT, Entry
from semkv_deploy.evaluate.store import WORK, Cell, Store, code_digest, digest, files_digest
from semkv_deploy.evaluate.tasks import TASKS
from semkv_deploy.evaluate.tasks.base import Setting
from semkv_deploy.evaluate.texts import load_corpora, load_records
from semkv_deploy.model.exported import DECODER, TOKENIZER, open_export
from semkv_deploy.model.tokenizer import read_tokenizer

if TYPE_CHECKING:
    from semkv_deploy.bundle import Bundle
    from semkv_deploy.evaluate.subject import Subject
    from semkv_deploy.evaluate.tasks.base import Example, Task
    from semkv_deploy.model.config import ModelFacts

Progress = Callable[[str, float | None], None]

COMMON = ("evaluate/metrics.py", "evaluate/tasks/base.py")
"""Code that decides every cell, with the task's own."""

OURS = (
    *(
        "budget.py",
        "budget_units.py",
        "graph",
        "model",
        "ops",
        "methods",
        "passes",
        "compiler",
        "runtime",
        "targets/engine.py",
        "targets/onnxruntime",
    ),
    "evaluate/bundles.py",
)
"""Code that decides the cells of our methods."""

PEERS = ("evaluate/kvpress.py", "evaluate/kvpress_worker.py")
"""Code that decides the cells of kvpress."""

ENDS = (Entry(FULL, FULL), Entry(NO_CONTEXT, NO_CONTEXT))


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        source: a checkpoint folder, a GGUF file, a hub id, or decoder.onnx of an export.
        out: the results folder.
        texts: files that stand for a corpus.
        threads: of whatever computes; None: all cores.
        peers_python: an interpreter that has kvpress; None: this one.
    """

    source: str
    out: Path
    methods: Sequence[Entry]
    budgets: Sequence[float]
    tasks: Sequence[Task]
    context: int = 1024
    examples: int = 8
    seed: int = 0
    texts: dict[str, Path] = field(default_factory=dict)
    threads: int | None = None
    peers_python: Path | None = None


@dataclass
class Prepared:
    """The model, and the examples of every task."""

    decoder: Path
    facts: ModelFacts
    longest: int
    tokenizer: Any
    examples: dict[str, list[Example]]
    shared: dict[str, dict[str, Any]]
    """By task, what decides its cells whatever the method."""


def evaluate(plan: Plan, progress: Progress = lambda what, share: None) -> Iterator[dict[str, Any]]:
    """Measures what was not measured before; yields every cell of the plan, those that were there first as well.

    Raises:
        SemkvError: when the model, a text or a method cannot be had. Cells that were measured stay.
    """
    store = Store(plan.out)
    prepared = prepare(plan, store, progress)
    cells = plan_cells(plan, prepared)
    full = {cell.task: cell for cell in cells if cell.entry.name == FULL}
    done = 0
    ours = ((entry,) for entry in plan.methods if not entry.is_peer)
    for entries in (ENDS, *ours, tuple(entry for entry in plan.methods if entry.is_peer)):
        with contextlib.ExitStack() as stack:
            # Made when the first cell is missing. The ends of the scale share a bundle, kvpress's presses a process.
            opener: Opener | None = None
            for cell in (cell for entry in entries for cell in cells if cell.entry is entry):
                result = _known(store, cell, prepared)
                if result is None:
                    opener = opener or _opener(plan, prepared, entries[0], stack, progress)
                    progress(f"{cell.task}: {cell.entry.text} at {cell.budget:g}", done / len(cells))
                    result = _measure(prepared, store, cell, full[cell.task], opener)
                done += 1
                yield result
    progress("evaluating", 1.0)


def prepare(plan: Plan, store: Store, progress: Progress) -> Prepared:
    """Exports the model where it is not exported yet, and makes the examples."""
    decoder, model_hash = exported(plan.source, store, progress)
    facts = open_export(decoder)
    tokenizer = read_tokenizer(decoder.parent / TOKENIZER)
    longest = max_context(plan.context, max(task.extra for task in plan.tasks), facts)
    progress("reading texts", None)
    corpora = load_corpora((name for task in plan.tasks for name in task.texts), plan.texts, tokenizer)
    setting = Setting(
        context=plan.context,
        count=plan.examples,
        seed=plan.seed,
        texts={name: corpus.tokens for name, corpus in corpora.items()},
        tokenizer=tokenizer,
        records=load_records((name for task in plan.tasks for name in task.records), plan.texts),
    )
    for name, corpus in corpora.items():
        if len(corpus.tokens) < 2 * plan.context:
            raise SemkvError(
                "the text is too short",
                where=f"--text {name}",
                expected=f"{2 * plan.context} tokens or more",
                got=len(corpus.tokens),
            )
    examples = {task.name: task.examples(setting) for task in plan.tasks}
    common = {
        "model": facts.source,
        "model_sha256": model_hash,
        "context": plan.context,
        "examples": plan.examples,
        "seed": plan.seed,
        "versions": tool_versions(),
    }
    shared = {
        task.name: {
            **common,
            # The examples themselves: data maker, texts and tokenizer are all in them.
            "data": digest([[each.turns, [vars(ask) for ask in each.asks]] for each in examples[task.name]]),
            "code": code_digest(*COMMON, type(task).__module__.split(".", 1)[1].replace(".", "/")),
        }
        for task in plan.tasks
    }
    return Prepared(decoder, facts, longest, tokenizer, examples, shared)


def exported(source: str, store: Store, progress: Progress) -> tuple[Path, str]:
    """The portable decoder of a source, exported once for a results folder, and the hash of the source."""
    from semkv_deploy.export import export_model
    from semkv_deploy.methods import METHODS

    path = Path(source).expanduser()
    if path.suffix == ".onnx":
        parts = (path, path.with_name(f"{path.name}.data"), path.parent / TOKENIZER)
        return path, digest([files_digest(part) for part in parts])
    # A hub id has no bytes here; its revision is what the hub gives.
    progress("hashing the model", None)
    name = files_digest(path) if path.exists() else digest(source)
    out = store.root / WORK / f"export-{name[:16]}"
    if not (out / DECODER).is_file():
        out.parent.mkdir(parents=True, exist_ok=True)
        export_model(source, out, METHODS[FULL](kind=FULL), progress=progress)
    return out / DECODER, name


def plan_cells(plan: Plan, prepared: Prepared) -> list[Cell]:
    """Every cell of the table, in the order in which it is measured."""
    cells = []
    for entry in (*ENDS, *plan.methods):
        for budget in [1.0] if entry.is_end else plan.budgets:
            for task in plan.tasks:
                allowed = [
                    allowed_bytes(budget, each.tokens, prepared.longest, prepared.facts)
                    for each in prepared.examples[task.name]
                ]
                facts = {**prepared.shared[task.name], "allowed_bytes": digest(allowed), **_facts(entry, prepared)}
                cells.append(Cell(entry, budget, task.name, facts))
    return cells


def _facts(entry: Entry, prepared: Prepared) -> dict[str, Any]:
    """What decides an entry's cells beside what they share."""
    if entry.is_peer:
        return {"press": entry.name, "options": dict(entry.options), "by": code_digest(*PEERS)}
    ours = {"max_context": prepared.longest, "by": code_digest(*OURS)}
    if entry.is_end:
        return {"end": entry.name, **ours}
    hold = {"hold": "all"} if entry.holds_all else {}
    text = {} if entry.calibration_text is None else {CALIBRATION_TEXT: files_digest(entry.calibration_text)}
    build = {**entry.build_options, **text}
    return {"parameters": entry.method().model_dump(mode="json"), "build": build, **hold, **ours}


def _known(store: Store, cell: Cell, prepared: Prepared) -> dict[str, Any] | None:
    """A cell's result where it was measured before; the full cache's only with what the others are compared with."""
    compared = cell.entry.name == FULL and TASKS[cell.task].has_reference
    if compared and not store.has_references(cell, len(prepared.examples[cell.task])):
        return None
    return store.read(cell)


Opener = Callable[["Cell"], "Subject"]


def _opener(plan: Plan, prepared: Prepared, entry: Entry, stack: contextlib.ExitStack, progress: Progress) -> Opener:
    """What gives a cell's subject; the one before is closed when another is needed."""
    opened: dict[tuple[str, float], Subject] = {}

    @stack.callback
    def close() -> None:
        for subject in opened.values():
            subject.close()
        opened.clear()

    if entry.is_peer:
        make = _peer_opener(plan, prepared, stack)
    else:
        budgets = [1.0] if entry.is_end else plan.budgets
        build = Entry(FULL, FULL) if entry.is_end else entry
        work = plan.out / WORK
        work.mkdir(exist_ok=True)

        def bundle_for(budgets: Sequence[float]) -> Bundle:
            bundles = built(build, prepared.decoder, budgets, prepared.longest, work, progress, context=plan.context)
            return stack.enter_context(bundles)

        bundle = None if build.chooses else bundle_for(budgets)

        def make(cell: Cell) -> Subject:
            return BundleSubject(
                bundle or bundle_for([cell.budget]),
                cell.budget,
                threads=plan.threads,
                blind=cell.entry.name == NO_CONTEXT,
                hold_all=cell.entry.holds_all,
            )

    def opener(cell: Cell) -> Subject:
        key = cell.entry.name, cell.budget
        if key not in opened:
            close()
            opened[key] = make(cell)
        return opened[key]

    return opener


def _peer_opener(plan: Plan, prepared: Prepared, stack: contextlib.ExitStack) -> Opener:
    from semkv_deploy.evaluate.kvpress import KvpressProcess, KvpressSubject

    tokenizer = prepared.decoder.parent / TOKENIZER
    process = KvpressProcess(plan.source, tokenizer, python=plan.peers_python, threads=plan.threads)
    stack.callback(process.close)

    def make(cell: Cell) -> Subject:
        def allowed(tokens: int) -> int:
            return allowed_bytes(cell.budget, tokens, prepared.longest, prepared.facts)

        return KvpressSubject(process, cell.entry, prepared.facts, allowed)

    return make


def _measure(prepared: Prepared, store: Store, cell: Cell, full: Cell, opener: Opener) -> dict[str, Any]:
    """Measures a cell and writes it, with what the others are compared with where it is the full cache's."""
    task = TASKS[cell.task]

    def decode(ids: Sequence[int]) -> str:
        return str(prepared.tokenizer.decode(list(ids), skip_special_tokens=True))

    subject = opener(cell)
    rows = []
    for number, example in enumerate(prepared.examples[cell.task]):
        started = time.perf_counter()
        kept = subject.read(example.turns)
        read_s = time.perf_counter() - started
        if cell.entry.name == FULL and task.has_reference:
            store.write_reference(full, number, task.reference(example, subject))
        reference = store.reference(full, number) if task.has_reference else None
        numbers = task.measure(example, subject, decode, reference)
        allowed = allowed_bytes(cell.budget, example.tokens, prepared.longest, prepared.facts)
        rows.append(
            {
                **numbers,
                "kept_bytes": kept.bytes,
                "kept_share": kept.share,
                "allowed_bytes": allowed,
                "read_tokens": example.tokens,
                "read_s": round(read_s, 3),
                "seconds": round(time.perf_counter() - started, 3),
                **example.note,
            }
        )
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return store.write(cell, {"backend": subject.backend, "peak_mib": peak // 1024, "rows": rows})
