"""The child process in which TensorRT parses and builds: `python -m semkv_deploy.targets.tensorrt.worker`.

Takes one JSON object on standard input: {"task": "build", "request": an EngineRequest} or {"task": "creators",
"runtime": …, "library": …}. Gives events on standard output, one JSON object a line: "log" and "progress", then one
"result" or "error". What libraries print goes to standard error.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from semkv_deploy.errors import SemkvError
from semkv_deploy.targets.tensorrt.api import TITLES, Runtime, runtime_module
from semkv_deploy.targets.tensorrt.optimization_profiles import check_profiles
from semkv_deploy.targets.tensorrt.progress import make_monitor
from semkv_deploy.targets.tensorrt.proof import Layer, check_inputs_are_used, prove, unused_input
from semkv_deploy.targets.tensorrt.request import EngineRequest, EngineResult

Emit = Callable[[dict[str, Any]], None]

CHATTER = re.compile(
    r"Make sure (input|output) .* has Int64 binding"
    # A machine without a driver says this of every library it loads; TensorRT-RTX needs none to build.
    r"|catchCudaError.*cudaError 35"
)
"""Lines of TensorRT's log that say nothing of the graph."""

WEIGHTS = re.compile(r"Total Weights Memory: (\d+) bytes")
"""What the builder says of the weights in the plan, on a line that is no warning."""

UNUSED_INPUT = re.compile(r"Unused Input: (.+)")

HINTS = {
    "Plugin not found": "load the plugin library (--plugin-library), or lower the node to standard operators",
    "dedicated kernel": "no fused kernel has this Attention's shape: run semkv-deploy inspect --lint",
    "no optimization profile": "give shapes for every dynamic input",
    "circular": "wrap the write index outside of TensorScatter: only linear mode is taken",
    "KVCacheUpdate": "caches must be graph inputs of static capacity in float32, float16 or bfloat16",
    "TensorScatter": "caches must be graph inputs of static capacity in float32, float16 or bfloat16",
    "workspace": "raise the memory limit",
}
"""Words of TensorRT's errors -> what to do."""

LINT = "run semkv-deploy inspect --lint on the graph: it names what TensorRT does not take"


def main() -> None:
    """Reads the task, does it, and gives its events."""
    # Libraries print to file descriptor 1, which is for events only.
    events = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    lock = threading.Lock()

    def emit(event: dict[str, Any]) -> None:
        with lock:
            events.write(json.dumps(event) + "\n")

    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: a build must not outlive who asked for it
    task = json.load(sys.stdin)
    try:
        if task["task"] == "creators":
            emit({"event": "result", "creators": creators(task["runtime"], Path(task["library"]), emit)})
        else:
            result = build(EngineRequest.model_validate(task["request"]), emit)
            emit({"event": "result", **result.model_dump(mode="json")})
    except SemkvError as error:
        fields = {name: getattr(error, name) for name in ("what", "where", "expected", "got", "fix")}
        emit({"event": "error", **{name: None if value is None else str(value) for name, value in fields.items()}})


def build(request: EngineRequest, emit: Emit) -> EngineResult:
    """Parses, proves, builds; writes the plan.

    Raises:
        SemkvError: as `build_engine`.
    """
    started = time.monotonic()
    trt = runtime_module(request.runtime)
    logger = make_logger(trt, emit)
    builder = _start(trt, logger, request.runtime)
    where = request.onnx.name
    if request.plugin_library is not None:
        load_library(trt, request.plugin_library, logger)
    if request.plugins:
        check_creators(trt, request.plugins)
    emit({"event": "progress", "what": "parsing", "share": None})
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(request.onnx)):
        raise _parser_error(parser, where, logger)
    layers = network_layers(trt, network)
    inputs = {tensor.name: tuple(tensor.shape) for tensor in map(network.get_input, range(network.num_inputs))}
    outputs = [network.get_output(i).name for i in range(network.num_outputs)]
    check_inputs_are_used(layers, list(inputs), outputs, where=where)
    proved = prove(layers, request.promised, request.aliases, where=where)

    check_profiles(inputs, request.profiles, where)
    config = builder.create_builder_config()
    _configure(trt, builder, config, request)
    timing = _TimingCache(trt, config, request)
    monitor = make_monitor(trt, emit, "building")
    config.progress_monitor = monitor
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise _build_error(logger, where)
    _refuse_unused_inputs(logger, where)
    with request.plan.open("wb") as file:
        file.write(memoryview(plan))
    return EngineResult(
        bytes=request.plan.stat().st_size,
        seconds=round(time.monotonic() - started, 3),
        layer_kinds=dict(sorted(Counter(layer.kind for layer in layers).items())),
        proved=proved,
        warnings=list(dict.fromkeys(logger.warnings)),
        version=trt.__version__,
        peak_rss=_peak_rss(),
        timing_cache=timing.save(),
        weight_bytes=logger.weight_bytes,
    )


def creators(runtime: Runtime, library: Path, emit: Emit) -> list[str]:
    """Creators that a library registers."""
    trt = runtime_module(runtime)
    logger = make_logger(trt, emit)
    builder = _start(trt, logger, runtime)  # TensorRT logs to the logger of a builder that lives
    before = set(_registered(trt))
    load_library(trt, library, logger)
    found = sorted(set(_registered(trt)) - before)
    del builder
    return found


def make_logger(trt: ModuleType, emit: Emit) -> Any:
    """A `trt.ILogger` with lists `warnings` and `errors`, chatter left out, and the plan's `weight_bytes`."""

    class Logger(trt.ILogger):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.warnings: list[str] = []
            self.errors: list[str] = []
            self.weight_bytes: int | None = None

        def log(self, severity: Any, message: str) -> None:
            if found := WEIGHTS.match(message):
                self.weight_bytes = int(found[1])
            if severity > trt.ILogger.WARNING or CHATTER.search(message):
                return
            (self.warnings if severity == trt.ILogger.WARNING else self.errors).append(message)
            emit({"event": "log", "text": message})

    return Logger()


def network_layers(trt: ModuleType, network: Any) -> list[Layer]:
    """The layers of a parsed network as data."""
    found = []
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        kind = layer.type.name
        inputs = [layer.get_input(j) for j in range(layer.num_inputs)]
        outputs = [layer.get_output(j) for j in range(layer.num_outputs)]
        plugin = ""
        if kind == "PLUGIN_V3":
            # The binding gives the base class only; this is how its own samples get at the rest.
            layer.__class__ = trt.IPluginV3Layer
            core = layer.plugin.get_capability_interface(trt.PluginCapabilityType.CORE)
            plugin = f"{core.plugin_namespace}::{core.plugin_name}"
        names = [tuple(tensor.name for tensor in tensors if tensor is not None) for tensors in (inputs, outputs)]
        found.append(Layer(kind, layer.name, names[0], names[1], layer.metadata, plugin))
    return found


def load_library(trt: ModuleType, library: Path, logger: Any) -> None:
    """Loads a plugin library into TensorRT's registry.

    Raises:
        SemkvError: when TensorRT refuses it.
    """
    if trt.get_plugin_registry().load_library(str(library.resolve())) is None:
        raise SemkvError(
            "TensorRT does not load the plugin library",
            where=library,
            expected="a library with getCreators, for this system",
            got=_first(logger.errors),
            fix="build it with scripts/build_plugins.sh, and load it once only",
        )


def check_creators(trt: ModuleType, operators: Sequence[str]) -> None:
    """Fails unless the operators asked for as plugins have creators of our namespace and version.

    Raises:
        SemkvError: with the creators that there are.
    """
    from semkv_deploy.passes.plugin_nodes import NAMESPACE, VERSION

    registered = _registered(trt)
    for operator in operators:
        wanted = f"{NAMESPACE}::{operator} {VERSION}"
        if wanted not in registered:
            raise SemkvError(
                f"no plugin {operator} is registered",
                where="--plugins",
                expected=wanted,
                got=", ".join(registered) or "no plugins at all",
                fix="load the library that has it (--plugin-library), or leave it out of --plugins",
            )


def _registered(trt: ModuleType) -> list[str]:
    found = trt.get_plugin_registry().all_creators
    return sorted(f"{creator.plugin_namespace}::{creator.name} {creator.plugin_version}" for creator in found)


def _start(trt: ModuleType, logger: Any, runtime: Runtime) -> Any:
    try:
        return trt.Builder(logger)
    except TypeError:
        raise SemkvError(
            f"{TITLES[runtime]}'s builder does not start",
            where=f"--target {runtime}",
            got=_first(logger.errors),
            fix="see what `semkv-deploy doctor` says of the GPU and its driver",
        ) from None


def _configure(trt: ModuleType, builder: Any, config: Any, request: EngineRequest) -> None:
    config.clear_flag(trt.BuilderFlag.TF32)
    if request.memory_limit is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request.memory_limit)
    if request.runtime == "tensorrt-rtx" and request.compute_capabilities:
        known = trt.ComputeCapability.__members__
        config.num_compute_capabilities = len(request.compute_capabilities)
        for i, capability in enumerate(request.compute_capabilities):
            name = f"SM{capability}"
            if name not in known:
                raise SemkvError(
                    f"TensorRT-RTX {trt.__version__} does not know {name}",
                    where="--compute-capability",
                    expected=" or ".join(each for each in known if each.startswith("SM")),
                )
            config.set_compute_capability(known[name], i)
    if request.plugins:
        config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
    if request.embed_plugins:
        config.plugins_to_serialize = [str(request.plugin_library)]
    for shapes in request.profiles:
        profile = builder.create_optimization_profile()
        for name, (low, usual, high) in shapes.items():
            profile.set_shape(name, low, usual, high)
        config.add_optimization_profile(profile)


class _TimingCache:
    """Kernel timings of earlier builds. TensorRT-RTX times nothing when it builds: its calls for this do nothing."""

    def __init__(self, trt: ModuleType, config: Any, request: EngineRequest) -> None:
        self.path, self.config = request.timing_cache, config
        self.said = "none asked for"
        if self.path is None:
            return
        if request.runtime == "tensorrt-rtx":
            self.path, self.said = None, "not used: TensorRT-RTX times no kernels when it builds"
            return
        content = self.path.read_bytes() if self.path.is_file() else b""
        self.said = "read and written" if content else "written"
        cache = config.create_timing_cache(content)
        if not config.set_timing_cache(cache, False):
            self.said = "written anew: it was of another version or GPU"
            config.set_timing_cache(config.create_timing_cache(b""), False)

    def save(self) -> str:
        """Writes the file; what became of it."""
        if self.path is not None:
            partial = self.path.with_name(f".{self.path.name}.{os.getpid()}.partial")
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(memoryview(self.config.get_timing_cache().serialize()))
            os.replace(partial, self.path)
        return self.said


def _refuse_unused_inputs(logger: Any, where: str) -> None:
    """What TensorRT itself says of inputs, once it has built."""
    for line in logger.warnings:
        if match := UNUSED_INPUT.search(line):
            raise unused_input(match[1], where)


def _parser_error(parser: Any, where: str, logger: Any) -> SemkvError:
    if not parser.num_errors:
        return SemkvError("TensorRT does not parse the graph", where=where, got=_first(logger.errors), fix=LINT)
    error = parser.get_error(0)
    text = " ".join(error.desc().split())
    stack = [*error.local_function_stack()]
    inside = f" in the body of {', '.join(stack)}" if stack else ""
    return SemkvError(
        f"TensorRT refuses node {error.node_name() or error.node()} ({error.node_operator()}){inside}",
        where=where,
        got=text,
        fix=_hint(text),
    )


def _build_error(logger: Any, where: str) -> SemkvError:
    text = _first(logger.errors)
    return SemkvError("TensorRT could not build the engine", where=where, got=text, fix=_hint(text))


def _hint(text: str) -> str:
    return next((fix for words, fix in HINTS.items() if words.lower() in text.lower()), LINT)


def _first(errors: Sequence[str]) -> str:
    return " ".join(errors[0].split())[:600] if errors else "no message"


def _peak_rss() -> int:
    # Not getrusage: its peak is the parent's when the child was forked from a larger process.
    if (status := Path("/proc/self/status")).exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import psutil

    memory = psutil.Process().memory_info()
    return int(getattr(memory, "peak_wset", memory.rss))


if __name__ == "__main__":
    main()
