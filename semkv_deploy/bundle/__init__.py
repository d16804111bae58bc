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
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from semkv_deploy.budget import StaticProfile
from semkv_deploy.budget_units import BudgetLike, choose_share
from semkv_deploy.bundle.contract import Layout, Phase, StaticBudgetContract
from semkv_deploy.errors import SemkvError
from semkv_deploy.methods import AnyMethod
from semkv_deploy.model.config import ModelFacts

SCHEMA_VERSION = 3
MANIFEST = "bundle.json"


class FileRecord(BaseModel):
    """Size in bytes and SHA-256 of one file of a bundle."""

    bytes: int
    sha256: str


class TargetRecord(BaseModel):
    """What was built for ONNX Runtime.

    Attributes:
        decoder, compressor: graph files, relative to the bundle.
        aliases: decoder input -> output that is the same buffer (appended in place).
        weights: how weights are stored.
        weight_bytes: bytes of the decoder's weights.
        weight_kl: mean KL (nats per token) that storing them so costs on the calibration text; None: not lossy.
        lint: findings that did not stop the build.
    """

    kind: Literal["onnxruntime"] = "onnxruntime"
    decoder: str
    compressor: str | None
    aliases: dict[str, str]
    weights: Literal["fp32", "int8", "int4"]
    weight_bytes: int
    weight_kl: float | None
    lint: list[str]


class EngineRecord(BaseModel):
    """One graph for TensorRT and the engine built from it.

    Attributes:
        onnx: the lowered graph, relative to the bundle; its weights lie in `TensorRTRecord.weights`.
        plan: the engine; None when engines were not built (`--no-engines`).
        bytes: of the engine.
        layers: how many layers of each kind the lowering promised; with a plan also proved: each was found by name in
            TensorRT's network.
        seconds: it took to build; 0 when it came from the engine cache.
        weight_bytes: weights that the plan holds, as the builder counts; no engine shares those of another, because
            TensorRT-RTX makes no weight-stripped or refittable plan without a GPU. None without a plan, or not said.
        peak_rss: most bytes of memory of the process that built it; None: not built by this build.
        timing_cache: what became of the kernel timings; "" without a plan.
        warnings: of TensorRT's builder, each once.
    """

    phase: Phase
    onnx: str
    plan: str | None
    bytes: int
    layers: dict[str, int]
    seconds: float = 0
    weight_bytes: int | None = None
    peak_rss: int | None = None
    timing_cache: str = ""
    warnings: list[str] = []


class TensorRTBudget(BaseModel):
    """One budget: the contract of its engines, and the engines."""

    contract: StaticBudgetContract
    engines: list[EngineRecord]


class TensorRTRecord(BaseModel):
    """What was built for TensorRT or TensorRT-RTX.

    Attributes:
        version: of the runtime that built the engines; only the same one opens them. None without engines.
        compute_capabilities: the GPUs the engines are for, 86 for 8.6.
        weights: external data of all graphs, relative to the bundle; `weight_bytes` of it are in each engine, once for
            each profile that packs them its own way.
        plugins: operators that are plugins in the engines; `plugin_library` is the library's file name.
        lint: findings that did not stop the build.
    """

    kind: Literal["tensorrt"] = "tensorrt"
    runtime: Literal["tensorrt", "tensorrt-rtx"]
    version: str | None
    compute_capabilities: list[int]
    dtype: Literal["float32", "float16", "bfloat16"]
    layout: Layout
    weights: str
    weight_bytes: int
    plugins: list[str]
    plugin_library: str | None
    budgets: list[TensorRTBudget]
    lint: list[str]


AnyTarget = Annotated[TargetRecord | TensorRTRecord, Field(discriminator="kind")]


class Calibration(BaseModel):
    """Share of slots each layer keeps by threshold, on the calibration text.

    Attributes:
        tokens: length of the text.
        thresholds: of the curve.
        kept: `[layers][thresholds]` shares.
    """

    tokens: int
    thresholds: list[float]
    kept: list[list[float]]


class BuiltProfile(StaticProfile):
    """A profile and its thresholds `[layers][levels]`."""

    thresholds: list[list[float]]


class Manifest(BaseModel):
    """`bundle.json`."""

    model_config = ConfigDict(extra="forbid")

    schema_version: int = SCHEMA_VERSION
    model: ModelFacts
    method: AnyMethod
    max_context: int
    profiles: list[BuiltProfile]
    calibration: Calibration | None
    targets: dict[str, AnyTarget]
    versions: dict[str, str]
    files: dict[str, FileRecord]


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

    def profile(self, budget: BudgetLike | None) -> BuiltProfile:
        """Returns the profile of a budget that was built.

        Args:
            budget: its share, or slots or bytes that give its capacity; None: the smallest.

        Raises:
            SemkvError: when the budget was not built.
        """
        profiles = {profile.budget: profile for profile in self.manifest.profiles}
        if budget is None:
            return profiles[min(profiles)]
        facts, records = self.manifest.model, self.manifest.targets.values()
        cache_types = {record.dtype if isinstance(record, TensorRTRecord) else facts.dtype for record in records}
        share = choose_share(list(profiles), budget, self.manifest.max_context, slot_bytes(facts, cache_types))
        return profiles[share]

    def target(self, name: str) -> TargetRecord | TensorRTRecord:
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


def slot_bytes(facts: ModelFacts, cache_types: Iterable[str]) -> int:
    """Returns the bytes of one slot's keys and values over all layers, in the largest of the targets' cache types."""
    sizes = (facts.model_copy(update={"dtype": dtype}).cache_bytes_per_token for dtype in cache_types)
    return max(sizes, default=facts.cache_bytes_per_token)


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Records every file below `root` in the manifest and writes it."""
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    files = {
        name: FileRecord(bytes=(root / name).stat().st_size, sha256=sha256(root / name))
        for name in names
        if name != MANIFEST
    }
    text = manifest.model_copy(update={"files": files}).model_dump_json(indent=1)
    (root / MANIFEST).write_text(text + "\n", encoding="utf-8")


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
