"""Which layer differs first, and in what: the failing event again, call by call, with their inner tensors exposed.

The reference is replayed up to the failing event. Before each call it then makes, both graphs get the call's inputs and
the reference's caches, so that nothing that differs comes from before. Of a decoder call, every float tensor that has
one name in both graphs is compared in the reference's order, and for each layer what goes into attention, what is
appended to the caches and what comes out; of a compression, the outputs of every layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict

from semkv_deploy.methods.layout import DECODE
from semkv_deploy.model import names
from semkv_deploy.targets.engine import graph_for
from semkv_deploy.targets.onnxruntime.engine import onnxruntime
from semkv_deploy.targets.onnxruntime.native import required_library
from semkv_deploy.validate.compare import Tolerance, difference, live_rows
from semkv_deploy.validate.runner import StatefulRunner
from semkv_deploy.validate.ties import run_compressor

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

    from semkv_deploy.targets.engine import Feeds
    from semkv_deploy.validate.checks import Graphs
    from semkv_deploy.validate.scenario import Event

MOVES = ("Transpose", "Reshape", "Cast", "Identity", "Expand", "Unsqueeze", "Squeeze")
"""Operators that compute nothing: a difference in their result is one in their input."""


class Bisection(BaseModel):
    """The first difference inside the graphs.

    Attributes:
        layer: number of the decoder layer; None: outside the layers, or none was found.
        what: "key", "value", "query", "cache append (key)", "attention output", "slots", "level", a tensor's role, or
            why nothing was found.
        tensor: name in the target's graph.
        call: which call of the event, such as "prefill of 32 rows at position 96".
        max_absdiff: of that tensor.
    """

    model_config = ConfigDict(ser_json_inf_nan="strings")

    layer: int | None
    what: str
    tensor: str | None = None
    call: str | None = None
    max_absdiff: float | None = None

    def sentence(self) -> str:
        if self.tensor is None:
            return self.what
        place = f"layer {self.layer}" if self.layer is not None else "outside the layers"
        return f"first difference in {place}: {self.what} ({self.tensor}), {self.max_absdiff:.3g} apart, in {self.call}"


class _Found(Exception):
    def __init__(self, bisection: Bisection) -> None:
        self.bisection = bisection


def bisect(
    reference: Graphs,
    candidate: Graphs,
    *,
    tolerance: Tolerance,
    events: Sequence[Event],
    failing: int,
) -> Bisection:
    """The first layer and tensor of `candidate` that differ in event number `failing`.

    Args:
        reference, candidate: the two graphs.
        tolerance: what tensors may differ by: caches' for all, slots exactly.
        events: the scenario's events up to the failing one at least.
    """
    batch = len(events[0].count)
    runner = StatefulRunner("reference", lambda: reference.open(batch), batch)
    with runner:
        for event in events[:failing]:
            runner.infer(event.feed())
        assert runner.session is not None and runner.error is None, runner.error
        probe = _Probe(runner, reference, candidate, tolerance)
        runner.engine.before_call = probe
        runner.stopped = False
        event = events[failing]
        try:
            runner.infer_unguarded(event.feed())
        except _Found as found:
            return found.bisection
    return Bisection(
        layer=None,
        what="no call of this event differs when it starts from the reference's caches: the difference was there "
        "before, or builds up, or comes from what dead slots hold",
    )


class _Probe:
    """Compares both graphs on each call that the reference is about to make."""

    def __init__(self, runner: StatefulRunner, reference: Graphs, candidate: Graphs, tolerance: Tolerance) -> None:
        self._runner, self._tolerance = runner, tolerance
        self._reference, self._candidate = reference, candidate
        self._decoders: dict[str, tuple[_Exposed, _Exposed]] = {}

    def __call__(self, program: str, feeds: Any, row: int | None) -> None:
        if program == DECODE:
            self._decoder(feeds, row)
        else:
            self._compressor(feeds)

    def _decoder(self, feeds: Feeds, row: int | None) -> None:
        contract, engine = self._reference.opened.contract, self._runner.engine
        count = feeds["input_ids"].shape[1]
        graph = graph_for(self._candidate.opened.contract.decoders, prompt=row is not None or count > 1)
        if graph.name not in self._decoders:
            self._decoders[graph.name] = expose(self._reference, self._candidate, graph.name)
        decoders = self._decoders[graph.name]
        rows = slice(None) if row is None else slice(row, row + 1)
        groups = contract.cache.groups
        caches = [
            {buffer.name: engine.read(buffer.name, number)[rows] for buffer in contract.cache.buffers}
            for number in range(len(groups))
        ]
        ours, theirs = (graph.run(feeds, caches) for graph in decoders)
        name = f"prefill of {count} rows" if count > 1 else "decode"
        after = feeds["length"] + count
        for place in places(*decoders):
            expected, got = ours[place.reference], theirs[place.candidate]
            if place.cache:
                number = place.group if place.group is not None else place.layer or 0
                shape = (len(after[0]), len(groups[number].heads), -1, contract.head_dim)
                expected, got = (live_rows(array.reshape(shape), after[number]) for array in (expected, got))
            if expected.size != got.size:
                continue
            expected, got = _same_layout(expected, got)
            result = difference(expected, got, self._tolerance.cache)
            if result.where is not None:
                raise _Found(
                    Bisection(
                        layer=place.layer,
                        what=place.what,
                        tensor=place.candidate,
                        call=f"{name} at position {int(feeds['position_ids'][0, 0])}",
                        max_absdiff=result.max_absdiff,
                    )
                )

    def _compressor(self, feeds: dict[int, Feeds]) -> None:
        engine, groups = self._runner.engine, self._reference.opened.contract.cache.groups
        ours_of, theirs_of = (_compressors(graphs) for graphs in (self._reference, self._candidate))
        for number, given in feeds.items():
            buffers = engine.contract.compressed_buffers()
            state = {name: engine.read(buffer, number) for buffer, name in buffers.items()}
            ours, theirs = (run_compressor(of[number], {**state, **given}) for of in (ours_of, theirs_of))
            live = np.arange(groups[number].capacity) < ours["length_out"][:, None]
            columns = [("slots", f"{column.name}_out", None) for column in engine.contract.cache.slot_columns]
            # Which slots stay decides what lies in them.
            for what, name, limit in (*_COUNTED, *columns, *_COMPRESSED):
                first, second = ours[name], theirs[name]
                if first.ndim > 2:
                    mask = live[:, None, :, None] if first.ndim == 4 else live[:, None]
                    first, second = np.where(mask, first, 0), np.where(mask, second, 0)
                result = difference(first, second, getattr(self._tolerance, limit) if limit else 0.0)
                if result.where is not None:
                    raise _Found(
                        Bisection(
                            layer=groups[number].layer,
                            what=what,
                            tensor=name,
                            call=f"compression of {int(given['length'].max())} slots",
                            max_absdiff=result.max_absdiff,
                        )
                    )


def _compressors(graphs: Graphs) -> dict[int, Any]:
    """By group, a session on its compressor."""
    sessions = {}
    for graph in graphs.opened.contract.compressors:
        path = graphs.opened.path(graph.onnx)
        session = _session(path.read_bytes(), path.parent, graphs.opened.contract.native)
        sessions.update(dict.fromkeys(graph.groups, session))
    return sessions


_COUNTED = (("level", "level", None), ("length", "length_out", None))

_COMPRESSED = (
    ("evicted", "evicted", None),
    ("bias", "slot_bias_out", "bias"),
    ("key", "key_cache_out", "cache"),
    ("value", "value_cache_out", "cache"),
)
"""What a compression is compared in, beside slot columns and counts before them: what it is called, the output, and its
tolerance's name (None: exact)."""


class Place(NamedTuple):
    """A tensor to compare: its layer and, of several, its group; what it is; both names; whether it is a cache."""

    layer: int | None
    group: int | None
    what: str
    reference: str
    candidate: str
    cache: bool


class _Exposed:
    """A decoder whose inner tensors are outputs, run with or without caches in place."""

    def __init__(
        self, model: onnx.ModelProto, folder: Path, names: Sequence[str], in_place: bool, native: int | None
    ) -> None:
        from polygraphy.backend.onnx import ModifyOutputs

        self.graph, self._in_place = model.graph, in_place
        caches = [value.name for value in model.graph.output]
        self._outputs = list(dict.fromkeys([*caches, *names]))
        exposed = ModifyOutputs(model, self._outputs, copy=True)()
        self._session = _session(exposed.SerializeToString(), folder, native)

    def run(self, small: Feeds, caches: Sequence[Mapping[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
        """All outputs, for buffers of every group by name, which are copied."""
        ort = onnxruntime()
        binding = self._session.io_binding()
        held: dict[str, Any] = {}
        for value in self._session.get_inputs():
            array = small.get(value.name)
            if array is None:
                array = _cache(value, caches)
            held[value.name] = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array).copy())
            binding.bind_ortvalue_input(value.name, held[value.name])
        for name in self._outputs:
            past = names.past_of(name)
            if self._in_place and past in held and past != name:
                binding.bind_ortvalue_output(name, held[past])
            else:
                binding.bind_output(name)
        self._session.run_with_iobinding(binding)
        # Copied: what an in-place output shows is a buffer that ends with this call.
        return {name: np.array(value.numpy()) for name, value in zip(self._outputs, binding.get_outputs(), strict=True)}


def _cache(value: Any, caches: Sequence[Mapping[str, NDArray[Any]]]) -> NDArray[Any]:
    """The buffer that a decoder input such as `past_key_values.NN.part` takes, in its type and shape."""
    name, number, *part = value.name.split(".")
    if not names.is_cache_input(value.name):
        return caches[int(number)][name]
    array = caches[int(number)][part[0]]
    if value.shape[1] == 1 != array.shape[1]:
        array = array.reshape(-1, 1, *array.shape[2:])
    return array.astype(np.float16) if value.type == "tensor(float16)" else array


def _session(model: bytes, folder: Path, native: int | None = None) -> Any:
    ort = onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    if native is not None:
        options.register_custom_ops_library(str(required_library(native)))
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def expose(reference: Graphs, candidate: Graphs, name: str) -> tuple[_Exposed, _Exposed]:
    """The reference's decoder and the candidate's of this name, with everything exposed that `places` compares."""
    import onnx

    decoders = {graph.name: candidate.opened.path(graph.onnx) for graph in candidate.opened.contract.decoders}
    paths = (reference.decoders[0], decoders[name])
    models = [onnx.load(path, load_external_data=False) for path in paths]
    common = _common(models[0].graph, models[1].graph)
    made = []
    for model, path, graphs in zip(models, paths, (reference, candidate), strict=True):
        inside = [tensor for part in _parts(model.graph).values() for tensor in part.values()]
        native = graphs.opened.contract.native
        made.append(_Exposed(model, path.parent, [*common, *inside], graphs.in_place, native))
    return made[0], made[1]


def places(reference: _Exposed, candidate: _Exposed) -> Iterator[Place]:
    """Tensors to compare, in the order in which the reference makes them."""
    common = set(_common(reference.graph, candidate.graph))
    ours, theirs = _parts(reference.graph), _parts(candidate.graph)
    order = {name: number for number, node in enumerate(reference.graph.node) for name in node.output}
    found: list[tuple[tuple[int, int], Place]] = []
    for key, parts in ours.items():
        step = order[parts["attention output"]]
        for rank, (what, name) in enumerate(parts.items()):
            if what in theirs.get(key, {}):
                found.append(((step, rank), Place(*key, what, name, theirs[key][what], what.startswith("cache"))))
    for name in common:
        match = re.match(r"layers\.(\d+)", name)
        layer_of = int(match[1]) if match else None
        found.append(((order[name], -1), Place(layer_of, None, _role(name), name, name, False)))
    yield from (place for _, place in sorted(found, key=lambda item: (item[0], item[1].what)))


def _role(name: str) -> str:
    """What a tensor named after its module is, in a word or two."""
    module = re.sub(r"^layers\.\d+\.?", "", name).rpartition("/")[0]
    return f"output of {module}" if module else "output of the layer" if name.startswith("layers.") else name


def _parts(graph: onnx.GraphProto) -> dict[tuple[int, int | None], dict[str, str]]:
    """For each layer (and group, where it has several), what goes into attention and comes out: `{what: tensor}`.

    Knows `NexusAttention`, `GroupQueryAttention`, and `TensorScatter` with `Attention` or two products in its place.
    """
    readers: dict[str, onnx.NodeProto] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, node)
    found: dict[tuple[int, int | None], dict[str, str]] = {}
    for node in graph.node:
        match = re.fullmatch(r"layers\.(\d+)(?:\.group\.(\d+))?\.(attention|key_append|value_append)", node.name)
        if not match:
            continue
        parts = found.setdefault((int(match[1]), int(match[2]) if match[2] else None), {})
        if match[3] != "attention":
            part = match[3].removesuffix("_append")
            parts[part], parts[f"cache append ({part})"] = node.input[1], node.output[0]
        elif node.op_type.split("_")[0] in ("NexusAttention", "GroupQueryAttention"):
            parts.update(query=node.input[0], key=node.input[1], value=node.input[2])
            parts["cache append (key)"], parts["cache append (value)"] = node.output[1], node.output[2]
            parts["attention output"] = node.output[0]
        elif node.op_type == "Attention":
            parts.update({"query": node.input[0], "attention output": node.output[0]})
        elif node.op_type == "MatMul":
            follower = readers.get(node.output[0])
            while follower is not None and follower.op_type != "MatMul":
                follower = readers.get(follower.output[0])
            if follower is not None:
                parts["attention output"] = follower.output[0]
    return found


def _common(reference: onnx.GraphProto, candidate: onnx.GraphProto) -> list[str]:
    """Float tensors with one name in both graphs, made by operators that compute something."""
    skipped = {name for graph in (reference, candidate) for parts in _parts(graph).values() for name in parts.values()}
    made = {name for node in candidate.node for name in node.output}
    floats = _float_names(reference)
    return [
        name
        for node in reference.node
        for name in node.output
        if name in made and name in floats and name not in skipped and node.op_type not in MOVES
    ]


def _float_names(graph: onnx.GraphProto) -> set[str]:
    """Names of a portable decoder's float tensors: those with a layer's, norm's or head's name that are computed."""
    return {
        name
        for node in graph.node
        for name in node.output
        if name == "logits"
        or (
            node.op_type in ("MatMul", "Gemm", "Add", "Mul", "Sub", "Div", "Sigmoid", "Tanh", "Gelu", "Gather")
            and not any(part in ("length", "position_ids", "logits_index") for part in node.input)
        )
    }


def _same_layout(expected: NDArray[Any], got: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Attention's rows `[B,H,S,D]` where the other side has `[B,S,H*D]` or heads in the batch axis."""
    if expected.ndim == 4 and got.ndim == 3:
        return expected.transpose(0, 2, 1, 3).reshape(got.shape), got
    return expected, got.reshape(expected.shape)
