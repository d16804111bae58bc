"""What the builder is asked for and what it answers: JSON between this process, its child, and the engine cache."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from semkv_deploy.targets.tensorrt.api import Runtime
from semkv_deploy.targets.tensorrt.optimization_profiles import Shape
from semkv_deploy.targets.tensorrt.proof import Proof


class EngineRequest(BaseModel):
    """What to build. Always strongly typed, and without TF32: similarities of cache entries must be float32.

    Attributes:
        runtime: which TensorRT.
        onnx: the graph; external data lies beside it.
        plan: file to write; it appears only when the engine is built and proved.
        profiles: one dict an optimization profile: dynamic input -> (smallest, usual, largest shape).
        compute_capabilities: 86 for 8.6; none: `api.default_compute_capabilities`.
        plugin_library: library of plugins to load before parsing.
        embed_plugins: put the library into the plan.
        plugins: operators asked for as plugins; their creators must be registered.
        promised: (kind, ONNX node) of layers that the network must have: `proof.prove`.
        aliases: cache input -> output that must share a buffer.
        memory_limit: bytes of GPU workspace that the engine may use; None: no limit of ours.
        timing_cache: file of kernel timings, read and written; TensorRT-RTX has none.
        engine_cache: folder of built engines, made when missing.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    runtime: Runtime
    onnx: Path
    plan: Path
    profiles: list[dict[str, tuple[Shape, Shape, Shape]]] = []
    compute_capabilities: list[int] = []
    plugin_library: Path | None = None
    embed_plugins: bool = False
    plugins: list[str] = []
    promised: list[tuple[str, str]] = []
    aliases: dict[str, str] = {}
    memory_limit: int | None = Field(None, gt=0)
    timing_cache: Path | None = None
    engine_cache: Path | None = None


class EngineResult(BaseModel):
    """A built engine.

    Attributes:
        bytes: size of the plan.
        seconds: that parsing, proving and building took, wall clock; of the first build when it came from the cache.
        layer_kinds: number of layers of the parsed network by kind.
        proved: what `proof.prove` says.
        warnings: TensorRT's, each once.
        version: of the runtime.
        from_cache: the plan was found in the engine cache.
        peak_rss: most bytes of memory of the child process.
        timing_cache: what became of it.
        weight_bytes: in the plan, as the builder's log says; None: it does not.
    """

    bytes: int
    seconds: float
    layer_kinds: dict[str, int]
    proved: Proof
    warnings: list[str]
    version: str
    from_cache: bool = False
    peak_rss: int
    timing_cache: str
    weight_bytes: int | None = None
