"""The bundle on disk: a directory with a manifest, checked when it is opened, written whole or not at all."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from semkv_deploy.budget_units import BudgetLike, choose_share
from semkv_deploy.bundle.contract import Contract
from semkv_deploy.bundle.manifest import (
    SCHEMA_VERSION,
    AnyTarget,
    BudgetRecord,
    EngineRecord,
    FileRecord,
    Manifest,
    OnnxRuntimeRecord,
    TensorRTRecord,
)
from semkv_deploy.bundle.opened import OpenedBudget
from semkv_deploy.errors import SemkvError

if TYPE_CHECKING:
    from semkv_deploy.model.config import ModelFacts

MANIFEST = "bundle.json"

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
    """An opened bundle: its manifest, and files that are what the manifest says."""

    def __init__(self, root: Path, manifest: Manifest) -> None:
        self.root, self.manifest = root, manifest

    @classmethod
    def open(cls, root: Path, *, only: Sequence[str] = ()) -> Bundle:
        """Opens and verifies a bundle.

        Args:
            root: its directory.
            only: path prefixes to verify; all files when empty. Every file must exist in any case.

        Raises:
            SemkvError: naming the file that is missing, truncated or altered, or the manifest's fault.
        """
        path = root / MANIFEST
        rebuild = "build the bundle again, or copy it again from where it was built"
        if not root.is_dir():
            raise SemkvError("no such bundle", where=root, expected="a directory written by `semkv-deploy build`")
        if not path.is_file():
            raise SemkvError(f"not a bundle: it has no {MANIFEST}", where=root, fix="give the directory `build` wrote")
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise SemkvError(f"not valid JSON: {error}", where=path, fix=rebuild) from None
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
            raise SemkvError(f"{field}: {first['msg']}", where=path, fix=rebuild) from None
        for name, record in manifest.files.items():
            file = root / name
            if not file.is_file():
                raise SemkvError("file of the bundle is missing", where=file, fix=rebuild)
            if file.stat().st_size != record.bytes:
                raise SemkvError(
                    "file of the bundle is truncated or altered",
                    where=file,
                    expected=f"{record.bytes} bytes",
                    got=f"{file.stat().st_size} bytes",
                    fix=rebuild,
                )
            if (not only or name.startswith(tuple(only))) and sha256(file) != record.sha256:
                raise SemkvError(
                    "file of the bundle was altered",
                    where=file,
                    expected=f"SHA-256 {record.sha256[:12]}…",
                    got=f"{sha256(file)[:12]}…",
                    fix=rebuild,
                )
        return cls(root, manifest)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the manifest, and so of everything it lists."""
        return sha256(self.root / MANIFEST)

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
            self.root, contract, self.fingerprint, plugins=record.plugin_operators, compute_capabilities=record.gpus
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
        return OpenedBudget(self.root, self._contract(self.manifest.portable, budget), self.fingerprint)

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


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Records every file below `root` in the manifest and writes it."""
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    files = {
        name: FileRecord(bytes=(root / name).stat().st_size, sha256=sha256(root / name))
        for name in names
        if name != MANIFEST
    }
    (root / MANIFEST).write_text(manifest.model_copy(update={"files": files}).to_json(), encoding="utf-8")


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


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


@contextmanager
def new_directory(out: Path, *, force: bool = False) -> Iterator[Path]:
    """A directory that appears at `out` only when the block ends without an error.

    It is written beside `out` and renamed, so that an interrupted build leaves nothing behind.

    Args:
        out: final path.
        force: replace a directory that is there.

    Raises:
        SemkvError: when `out` exists and `force` is off, or its parent cannot be written to.
    """
    if out.exists() and not force:
        raise SemkvError("already exists", where=out, fix="choose another -o, or give --force to replace it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SemkvError(f"cannot be written to: {error.strerror}", where=out.parent, fix="choose another -o") from None
    # Named before it is made: a signal in between leaves nothing either.
    partial = out.parent / f".{out.name}.{uuid.uuid4().hex[:8]}.partial"
    try:
        try:
            partial.mkdir()
        except OSError as error:
            reason = f"cannot be written to: {error.strerror}"
            raise SemkvError(reason, where=out.parent, fix="choose another -o") from None
        yield partial
        partial.chmod(0o755)
        if out.exists():
            # Renamed away first: a crash between the two renames loses neither the old bundle nor the new one.
            old = partial.with_suffix(".replaced")
            os.rename(out, old)
            os.rename(partial, out)
            shutil.rmtree(old)
        else:
            os.rename(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
