"""What `bundle.json` says: the model, the method, and for every target what was built, with a contract a budget."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from semkv_deploy.budget_units import MAX_TOKENS
from semkv_deploy.bundle.contract import Contract
from semkv_deploy.bundle.files import FileRecord
from semkv_deploy.choices import DType, EngineLayout, StoredWeights, TensorRTTarget
from semkv_deploy.methods import AnyMethod
from semkv_deploy.model.config import ModelFacts

SCHEMA_VERSION = 5


class EngineRecord(BaseModel):
    """How one graph of a contract was built for TensorRT.

    Attributes:
        graph: its name in the contract, which has the files.
        bytes: of the engine; 0 when engines were not built (`--no-engines`).
        layers: how many layers of each kind the lowering promised; with a plan also proved: each was found by name in
            TensorRT's network.
        seconds: it took to build; 0 when it came from the engine cache.
        weight_bytes: weights that the plan holds, as the builder counts; no engine shares those of another, because
            TensorRT-RTX makes no weight-stripped or refittable plan without a GPU. None without a plan, or not said.
        peak_rss: most bytes of memory of the process that built it; None: not built by this build.
        timing_cache: what became of the kernel timings; "" without a plan.
        warnings: of TensorRT's builder, each once.
    """

    model_config = ConfigDict(extra="forbid")

    graph: str
    bytes: int
    layers: dict[str, int]
    seconds: float = 0
    weight_bytes: int | None = None
    peak_rss: int | None = None
    timing_cache: str = ""
    warnings: list[str] = []


class BudgetRecord(BaseModel):
    """One budget of one target: its contract, and for TensorRT how each of its graphs was built."""

    model_config = ConfigDict(extra="forbid")

    contract: Contract
    engines: list[EngineRecord] = []

    @model_validator(mode="after")
    def _engines_are_of_the_contract(self) -> BudgetRecord:
        names = [graph.name for graph in self.contract.graphs]
        if len(set(names)) != len(names) or (self.engines and [engine.graph for engine in self.engines] != names):
            raise ValueError(f"engines are of the graphs {[engine.graph for engine in self.engines]}, not of {names}")
        return self


class TargetRecord(BaseModel):
    """What every target has.

    Attributes:
        budgets: in rising order.
        lint: findings that did not stop the build.
    """

    model_config = ConfigDict(extra="forbid")

    budgets: list[BudgetRecord] = Field(min_length=1)
    lint: list[str] = []

    @property
    def files(self) -> tuple[str, ...]:
        """Files of the bundle that the record names beside its contracts'."""
        return ()

    @property
    def plugin_operators(self) -> tuple[str, ...]:
        """Operators that are plugins in the target's graphs."""
        return ()

    @property
    def gpus(self) -> tuple[int, ...]:
        """Compute capabilities that engines are for, 86 for 8.6."""
        return ()

    @property
    def on_gpu(self) -> bool:
        """Whether buffers lie in a GPU's memory, and graphs run as engines built for it."""
        return False


class OnnxRuntimeRecord(TargetRecord):
    """What was built for ONNX Runtime.

    Attributes:
        weights: how weights are stored.
        weight_bytes: bytes of the decoder's weights.
        weight_kl: mean KL (nats per token) that storing weights so costs on the calibration text, caches as they are
            stored; None: weights are not lossy.
        cache_kl: the same of the caches, with float32 weights; None: they are float32.
        native: why the decoder has native operators, or why not.
    """

    kind: Literal["onnxruntime"] = "onnxruntime"
    weights: StoredWeights
    weight_bytes: int = Field(ge=0)
    weight_kl: FiniteFloat | None
    cache_kl: FiniteFloat | None = None
    native: str = ""


class TensorRTRecord(TargetRecord):
    """What was built for TensorRT or TensorRT-RTX.

    Attributes:
        version: of the runtime that built the engines; only the same one opens them. None without engines.
        compute_capabilities: the GPUs the engines are for, 86 for 8.6.
        weights: external data of all graphs, relative to the bundle; `weight_bytes` of it are in each engine, once for
            each profile that packs them its own way.
        plugins: operators that are plugins in the engines; `plugin_library` is the library's file name.
    """

    kind: Literal["tensorrt"] = "tensorrt"
    runtime: TensorRTTarget
    version: str | None
    compute_capabilities: list[int]
    dtype: DType
    layout: EngineLayout
    weights: str
    weight_bytes: int
    plugins: list[str]
    plugin_library: str | None

    @property
    def files(self) -> tuple[str, ...]:
        return (self.weights,)

    @property
    def plugin_operators(self) -> tuple[str, ...]:
        return tuple(self.plugins)

    @property
    def gpus(self) -> tuple[int, ...]:
        return tuple(self.compute_capabilities)

    @property
    def on_gpu(self) -> bool:
        return True


AnyTarget = Annotated[OnnxRuntimeRecord | TensorRTRecord, Field(discriminator="kind")]


class Manifest(BaseModel):
    """`bundle.json`.

    Attributes:
        calibration: what the method was calibrated to (`methods.calibration.Settings`); None: nothing.
        portable: contracts of the portable graphs in `onnx/`, by budget: what every target was built from and is
            compared with. Empty where a bundle was built without them.
    """

    model_config = ConfigDict(extra="forbid")

    schema_version: int = SCHEMA_VERSION
    model: ModelFacts
    method: AnyMethod
    max_context: int = Field(ge=1, le=MAX_TOKENS)
    calibration: dict[str, Any] | None
    portable: list[Contract]
    targets: dict[str, AnyTarget] = Field(min_length=1)
    versions: dict[str, str]
    files: dict[str, FileRecord]

    @property
    def budgets(self) -> list[float]:
        """Every budget that was built, in rising order."""
        contracts = [*self.portable, *(built.contract for record in self.targets.values() for built in record.budgets)]
        return sorted({contract.budget for contract in contracts})

    def to_json(self) -> str:
        """The manifest as text; what is short is on one line, so that people can read it."""
        return _pretty(self.model_dump(mode="json"), "") + "\n"


_WIDTH = 120


def _pretty(value: Any, indent: str) -> str:
    """JSON in which a value that fits a line is on one."""
    flat = json.dumps(value, ensure_ascii=False)
    if len(flat) + len(indent) <= _WIDTH or not isinstance(value, dict | list) or not value:
        return flat
    inside = indent + " "
    if isinstance(value, dict):
        parts = [f"{json.dumps(key, ensure_ascii=False)}: {_pretty(item, inside)}" for key, item in value.items()]
        return "{\n" + ",\n".join(inside + part for part in parts) + f"\n{indent}}}"
    return "[\n" + ",\n".join(inside + _pretty(item, inside) for item in value) + f"\n{indent}]"
