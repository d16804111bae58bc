"""The bundle on disk: a directory with a manifest, checked when it is opened, written whole or not at all."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from semkv_deploy.budget_units import BudgetLike, choose_share
from semkv_deploy.bundle.consistency import check_manifest, contracts, named_files
from semkv_deploy.bundle.contract import Contract
from semkv_deploy.bundle.directory import new_directory
from semkv_deploy.bundle.files import REBUILD, BundleFiles, FileRecord, read_manifest, sha256
from semkv_deploy.bundle.graphs import check_graph
from semkv_deploy.bundle.manifest import (
    SCHEMA_VERSION,
    AnyTarget,
    BudgetRecord,
    EngineRecord,
    Manifest,
    OnnxRuntimeRecord,
    TensorRTRecord,
)
from semkv_deploy.bundle.opened import OpenedBudget
from semkv_deploy.bundle.own import MANIFEST
from semkv_deploy.errors import SemkvError

if TYPE_CHECKING:
    from semkv_deploy.model.config import ModelFacts

__all__ = [
    "MANIFEST",
    "SCHEMA_VERSION",
    "AnyTarget",
    "BudgetRecord",
    "Bundle",
    "Contract",
    "EngineRecord",
    "FileRecord",
    "Manifest",
    "OnnxRuntimeRecord",
    "OpenedBudget",
    "TensorRTRecord",
    "new_directory",
    "sha256",
    "tool_versions",
    "write_manifest",
]


class Bundle:
    """An opened bundle: its manifest, and files that are what the manifest says.

    Args:
        root: its directory.
        manifest: read and checked.
        fingerprint: SHA-256 of the manifest's file, and so of everything it lists.
        allow_plugins: the caller lets native code of plugins in its engines run.
    """

    def __init__(self, root: Path, manifest: Manifest, *, fingerprint: str = "", allow_plugins: bool = False) -> None:
        self.root, self.manifest, self.fingerprint, self.allow_plugins = root, manifest, fingerprint, allow_plugins
        self.files = BundleFiles(root, manifest.files)

    @classmethod
    def open(cls, root: Path, *, only: Sequence[str] = (), allow_plugins: bool = False) -> Bundle:
        """Opens and verifies a bundle: the manifest, the list of files, their bytes, the graphs against the manifest.

        Args:
            root: its directory.
            only: path prefixes of files whose bytes to verify; all when empty. All others must exist in any case, and
                no others may.
            allow_plugins: let native code of plugins in its engines run.

        Raises:
            SemkvError: naming the file that is missing, truncated, altered, not listed, or no regular file, or the
                manifest's fault.
        """
        path = root / MANIFEST
        if not root.is_dir():
            raise SemkvError("no such bundle", where=root, expected="a directory written by `semkv-deploy build`")
        if not os.path.lexists(path):
            raise SemkvError(f"not a bundle: it has no {MANIFEST}", where=root, fix="give the directory `build` wrote")
        text = read_manifest(root)
        try:
            raw = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise SemkvError(f"not valid JSON: {error}", where=path, fix=REBUILD) from None
        version = raw.get("schema_version") if isinstance(raw, dict) else None
        if version != SCHEMA_VERSION:
            raise SemkvError(
                "bundle of another schema version",
                where=path,
                expected=SCHEMA_VERSION,
                got=version,
                fix="build it again with this version of semkv-deploy",
            )
        try:
            manifest = Manifest.model_validate(raw)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"])
            raise SemkvError(f"{field}: {first['msg']}", where=path, fix=REBUILD) from None
        check_manifest(manifest, path)
        bundle = cls(root, manifest, fingerprint=hashlib.sha256(text).hexdigest(), allow_plugins=allow_plugins)
        bundle.files.check(only=only)
        bundle._check_named(only)
        return bundle

    def _check_named(self, only: Sequence[str]) -> None:
        """Every file that the manifest names is listed; graphs are what their contracts say."""
        for _, name in named_files(self.manifest):
            if name not in self.files.records:
                raise self.files.unlisted(name)
        graphs = defaultdict(list)
        for _, contract in contracts(self.manifest):
            for graph in contract.graphs:
                graphs[graph.onnx].append(graph)
        for name in sorted(self.files.records):
            if name.endswith(".onnx") and (not only or name.startswith(tuple(only))):
                check_graph(self.files, name, graphs[name])

    def read(self, name: str) -> bytes:
        """Bytes of a file of the bundle, hashed as they were read.

        Raises:
            SemkvError: when it is not listed, or was altered since the bundle was opened.
        """
        return self.files.read(name)

    def target(self, name: str) -> OnnxRuntimeRecord | TensorRTRecord:
        """What was built for a target.

        Raises:
            SemkvError: when the bundle was not built for it.
        """
        if name not in self.manifest.targets:
            raise SemkvError(
                "the bundle was not built for this target",
                where="--target",
                expected=" or ".join(self.manifest.targets),
                got=name,
            )
        return self.manifest.targets[name]

    def share(self, budget: BudgetLike) -> float:
        """The share that was built for a budget: the share itself, or the one that slots or bytes of a row give.

        Raises:
            SemkvError: when the budget was not built.
        """
        manifest = self.manifest
        cache_types = {built.contract.dtype for record in manifest.targets.values() for built in record.budgets}
        return choose_share(manifest.budgets, budget, manifest.max_context, slot_bytes(manifest.model, cache_types))

    def built(self, target: str, budget: BudgetLike | None = None) -> OpenedBudget:
        """One budget of a target, ready for an engine (None: the smallest one built).

        Raises:
            SemkvError: when the target or the budget was not built.
        """
        record = self.target(target)
        contract = self._contract([built.contract for built in record.budgets], budget)
        return OpenedBudget(
            self.root,
            contract,
            self.fingerprint,
            plugins=record.plugin_operators,
            compute_capabilities=record.gpus,
            files=self.files,
            allow_plugins=self.allow_plugins,
        )

    def portable(self, budget: BudgetLike | None = None) -> OpenedBudget:
        """One budget of the portable graphs (None: the smallest one built).

        Raises:
            SemkvError: when the budget was not built, or the bundle was built without portable graphs.
        """
        if not self.manifest.portable:
            raise SemkvError(
                "the bundle has no portable graphs to compare with",
                where=self.root,
                fix="build it again without --no-portable",
            )
        contract = self._contract(self.manifest.portable, budget)
        return OpenedBudget(self.root, contract, self.fingerprint, files=self.files)

    def _contract(self, contracts: Sequence[Contract], budget: BudgetLike | None) -> Contract:
        built = {contract.budget: contract for contract in contracts}
        if budget is None:
            return built[min(built)]
        share = self.share(budget)
        if share not in built:
            raise SemkvError(
                "the target was not built for this budget",
                where="--budget",
                expected=" or ".join(f"{each:g}" for each in sorted(built)),
                got=f"{share:g}",
            )
        return built[share]


def slot_bytes(model: ModelFacts, cache_types: Iterable[str]) -> int:
    """Returns the bytes of one slot's keys and values over all layers, in the largest of the targets' cache types."""
    sizes = (model.model_copy(update={"dtype": dtype}).cache_bytes_per_token for dtype in cache_types)
    return max(sizes, default=model.cache_bytes_per_token)


def write_manifest(root: Path, manifest: Manifest) -> Manifest:
    """Records every file below `root` in the manifest, writes it, and returns it."""
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    files = {
        name: FileRecord(bytes=(root / name).stat().st_size, sha256=sha256(root / name))
        for name in names
        if name != MANIFEST
    }
    manifest = manifest.model_copy(update={"files": files})
    (root / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def tool_versions() -> dict[str, str]:
    """Versions of what shapes a bundle's files."""
    names = (
        "semkv-deploy",
        "torch",
        "transformers",
        "onnx",
        "onnxscript",
        "onnxruntime",
        "onnxruntime-gpu",
        "tensorrt",
        "tensorrt-rtx-cu13-bindings",
    )
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
