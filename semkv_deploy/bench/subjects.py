"""Who is measured: budgets of bundles, and their peers, each with what is refused before anything is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from semkv_deploy.bench.engines import genai, llama_cpp, transformers
from semkv_deploy.bundle import Bundle
from semkv_deploy.methods.behaviours import NexusTurns
from semkv_deploy.targets import require_runnable

if TYPE_CHECKING:
    from semkv_deploy.budget_units import BudgetLike


@dataclass(frozen=True)
class Subject:
    """One row of the table.

    Attributes:
        name: tells it from all others of a run.
        kind: of engine.
        cache: type of the cache's elements, as its runtime calls it.
        options: of the engine, but for those that are the same for all: threads, batch, context.
        budget: None: a peer, with its full cache.
        bundle: name of the bundle; "" for a peer.
    """

    name: str
    kind: str
    cache: str
    options: dict[str, Any]
    budget: float | None = None
    bundle: str = ""

    @property
    def is_peer(self) -> bool:
        """Whether it is not ours."""
        return self.budget is None


def subjects_of_bundles(
    bundles: Sequence[Bundle], budgets: Sequence[BudgetLike], target: str, *, allow_plugins: bool
) -> list[Subject]:
    """Budgets of each bundle, the largest first.

    Args:
        budgets: that were built; empty: all.

    Raises:
        SemkvError: when a budget was not built, or the target does not run here.
    """
    require_runnable(target)
    found = []
    for bundle, name in zip(bundles, _names([bundle.root for bundle in bundles]), strict=True):
        shares = {bundle.share(budget) for budget in budgets} or set(bundle.manifest.budgets)
        for share in sorted(shares, reverse=True):
            budget = f"budget {share:g}"
            found.append(
                Subject(
                    name=budget if len(bundles) == 1 else f"{name}, {budget}",
                    kind="bundle",
                    cache=bundle.built(target, share).contract.dtype,
                    options={
                        "path": str(bundle.root),
                        "target": target,
                        "budget": share,
                        "allow_plugins": allow_plugins,
                    },
                    budget=share,
                    bundle=name,
                )
            )
    return found


def peers(
    *,
    genai_model: Path | None,
    gguf: Path | None,
    llama_caches: Sequence[str],
    llama_server: Path | None,
    transformers_source: str | None,
    vocabulary: int,
) -> list[Subject]:
    """Peers with their full caches; None of a path: not this one.

    Args:
        vocabulary: entries that their models must have at least.

    Raises:
        SemkvError: when a package is not installed, or a path is not what its peer reads.
    """
    found = []
    if genai_model is not None:
        genai.check(genai_model, vocabulary)
        cache = genai.cache_type(genai_model)
        found.append(Subject("onnxruntime-genai", "genai", cache, {"path": str(genai_model)}))
    if gguf is not None:
        llama_cpp.check(gguf, llama_caches, vocabulary, llama_server)
        program = None if llama_server is None else str(llama_server)
        for cache in dict.fromkeys(llama_caches):
            options = {"path": str(gguf), "cache": cache, "program": program}
            found.append(Subject(f"llama.cpp {cache}", "llama_cpp", cache, options))
    if transformers_source is not None:
        for cache in transformers.CACHES:
            options = {"path": transformers_source, "cache": cache}
            found.append(Subject(f"transformers {cache}", "transformers", "float32", options))
    return found


def reserved(bundle: Bundle) -> int:
    """Positions that the method may take at a turn's end: left free by all, so that all do the same work."""
    behaviours = [
        behaviour
        for record in bundle.manifest.targets.values()
        for built in record.budgets
        for behaviour in built.contract.behaviours
    ]
    return max((each.most for each in behaviours if isinstance(each, NexusTurns)), default=0)


def _names(roots: Sequence[Path]) -> list[str]:
    """The directories' names, or where two have the same one, as many of their parents' as it takes."""
    parts = [root.resolve().parts for root in roots]
    depth = 1
    while len({part[-depth:] for part in parts}) < len(set(parts)):
        depth += 1
    return ["/".join(part[-depth:]) for part in parts]
