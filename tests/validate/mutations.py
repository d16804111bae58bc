"""One mistake at a time, made in a target's graphs: what an exporter, a lowering or a kernel could get wrong.

Every mistake is made in layer 1 where a layer can be chosen, so that a bisection that always says "layer 0" fails.
The same list is made in ONNX Runtime's graph and in TensorRT's, in float16 with fused attention as it ships; where the
two differ, so does the edit. No weight is touched: rounded weights have a check of their own, which would stop there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

LAYER = "layers.01"


class Graph:
    """A graph that is being broken."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.model = onnx.load(path)
        self.graph = self.model.graph

    def save(self) -> None:
        data = self.path.with_name("decoder.onnx.data")
        if "compressor" in self.path.name:
            onnx.save(self.model, self.path)
        else:
            data.unlink()
            onnx.save(self.model, self.path, save_as_external_data=True, location=data.name)

    def node(self, name: str) -> onnx.NodeProto:
        (found,) = [node for node in self.graph.node if node.name == name]
        return found

    def maker(self, value: str) -> onnx.NodeProto:
        (found,) = [node for node in self.graph.node if value in node.output]
        return found

    def add(self, op_type: str, inputs: list[str], **attributes: Any) -> str:
        """A node before all that need it; nodes are sorted when all is done."""
        name = f"mutant.{len(self.graph.node)}"
        self.graph.node.append(helper.make_node(op_type, inputs, [name], name=name, **attributes))
        return name

    def constant(self, value: Any, dtype: Any) -> str:
        name = f"mutant.constant.{len(self.graph.initializer)}"
        self.graph.initializer.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def replace(self, old: str, new: str) -> None:
        """Every reader of `old`, but for what was added, reads `new`."""
        for node in self.graph.node:
            if not node.name.startswith("mutant."):
                for index, name in enumerate(node.input):
                    if name == old:
                        node.input[index] = new

    def swap_names(self, pairs: list[tuple[str, str]]) -> None:
        """Nodes that used one value of a pair use the other; inputs and outputs of the graph keep their order."""
        names = {**dict(pairs), **{second: first for first, second in pairs}}
        for node in self.graph.node:
            for values in (node.input, node.output):
                for index, name in enumerate(values):
                    values[index] = names.get(name, name)

    def permute_weight(self, product: str, order: Any, *, axis: int) -> None:
        """Rows (axis 0) or columns of a product's weight in another order; the stored weight stays the model's."""
        node = self.node(f"{LAYER}.{product}/MatMul")
        node.input[1] = self.add("Gather", [node.input[1], self.constant(order, np.int64)], axis=axis)

    def replace_output(self, name: str, make: Callable[[str], str]) -> None:
        """The graph's output `name` is what `make` adds, given the name of what it was."""
        maker, old = self.maker(name), f"right.{name}"
        maker.output[list(maker.output).index(name)] = old
        self.graph.node.append(helper.make_node("Identity", [make(old)], [name], name=f"mutant.{name}"))

    def sort(self) -> None:
        """Nodes after what they read."""
        ready = {value.name for value in (*self.graph.input, *self.graph.initializer)} | {""}
        pending, done = list(self.graph.node), []
        while pending:
            rest = []
            for node in pending:
                if set(node.input) <= ready:
                    done.append(node)
                    ready.update(node.output)
                else:
                    rest.append(node)
            assert len(rest) < len(pending), f"a cycle at {rest[0].name}"
            pending = rest
        del self.graph.node[:]
        self.graph.node.extend(done)

    @property
    def attention(self) -> onnx.NodeProto:
        return self.node(f"{LAYER}.attention")

    @property
    def is_gqa(self) -> bool:
        return self.attention.op_type == "GroupQueryAttention"

    def mask(self) -> onnx.NodeProto:
        """The `Where(hidden, floor, bias)` of TensorRT's graph, fused attention or decomposed."""
        if self.attention.op_type == "Attention":
            node = self.maker(self.attention.input[3])
        else:
            node = self._reader(self._reader(self.attention.output[0]).output[0])
            node = self.maker(node.input[1])
        while node.op_type != "Where":
            node = self.maker(node.input[0])
        return node

    def _reader(self, value: str) -> onnx.NodeProto:
        return next(node for node in self.graph.node if value in node.input)

    def length(self) -> str:
        """The layer's live slots `[B]`."""
        return f"{LAYER}.self_attn/Gather"


def bias_not_added(graph: Graph) -> None:
    if graph.is_gqa:
        graph.attention.input[10] = ""
    else:
        mask = graph.mask()
        mask.input[2] = graph.add("Mul", [mask.input[2], graph.constant(0.0, np.float32)])


def mask_dropped(graph: Graph) -> None:
    """Every row sees every new row; in TensorRT's graph dead slots too."""
    if graph.is_gqa:
        for attribute in graph.attention.attribute:
            if attribute.name == "causal":
                attribute.i = 0
        # Not taken by the kernel together.
        graph.attention.input[16] = ""
    else:
        mask = graph.mask()
        mask.input[0] = graph.add("And", [mask.input[0], graph.constant(False, np.bool_)])


def length_ignored(graph: Graph) -> None:
    graph.replace(graph.length(), graph.add("Sub", [graph.length(), graph.length()]))


def write_index_off_by_one(graph: Graph) -> None:
    one = graph.constant([1], np.int64)
    graph.replace(graph.length(), graph.add("Add", [graph.length(), one]))


def keys_and_values_swapped(graph: Graph) -> None:
    graph.swap_names([(f"{kind}.01.key", f"{kind}.01.value") for kind in ("past_key_values", "present")])


def layers_swapped(graph: Graph) -> None:
    parts = [f"{kind}.{{}}.{part}" for kind in ("past_key_values", "present") for part in ("key", "value")]
    graph.swap_names([(part.format("00"), part.format("01")) for part in parts])


def position_is_length(graph: Graph) -> None:
    """Positions counted from the live slots of layer 0: right until the first compression."""
    start = graph.add("Gather", ["length", graph.constant(0, np.int64)], axis=0)
    column = graph.add("Unsqueeze", [start, graph.constant([1], np.int64)])
    first = graph.add("Gather", ["position_ids", graph.constant([0], np.int64)], axis=1)
    offset = graph.add("Sub", ["position_ids", first])
    graph.replace("position_ids", graph.add("Add", [column, offset]))


def position_off_by_one(graph: Graph) -> None:
    graph.replace("position_ids", graph.add("Add", ["position_ids", graph.constant([[1]], np.int64)]))


def reader_after_updater(graph: Graph) -> None:
    """The old cache read by a node that nothing orders before the append."""
    seen = graph.add("ReduceMax", ["past_key_values.01.key"], keepdims=0)
    read = f"{LAYER}/Add"
    graph.replace(read, graph.add("Add", [read, seen]))


def scale_changed(graph: Graph) -> None:
    if graph.attention.op_type != "MatMul":
        for attribute in graph.attention.attribute:
            if attribute.name == "scale":
                attribute.f = 0.5
    else:
        scaled = graph.maker(graph.attention.input[0])
        scaled.input[1] = graph.constant(0.5, np.float32)


def key_not_rotated(graph: Graph) -> None:
    if graph.is_gqa:
        graph.attention.input[1] = f"{LAYER}.self_attn.k_proj/MatMul"
    else:
        graph.maker(graph.node(f"{LAYER}.key_append").input[1]).input[0] = f"{LAYER}.self_attn/Transpose_1"


def layer_scrambled(graph: Graph) -> None:
    graph.permute_weight("mlp.up_proj", np.arange(64)[::-1], axis=0)


def head_mapping_wrong(graph: Graph) -> None:
    """Query heads interleaved over KV heads (0, 1, 0, 1) where they come in groups (0, 0, 1, 1)."""
    order = np.arange(64).reshape(4, 16)[[0, 2, 1, 3]].ravel()
    graph.permute_weight("self_attn.q_proj", order, axis=1)
    graph.permute_weight("self_attn.o_proj", order, axis=0)


def input_of_another_layer(graph: Graph) -> None:
    """Layer 1's values are made from what layer 0 was given."""
    first = graph.maker("layers.00.self_attn.q_proj/MatMul").input[0]
    graph.maker(f"{LAYER}.self_attn.v_proj/MatMul").input[0] = first


def thresholds_ignored(graph: Graph) -> None:
    graph.replace("thresholds", graph.add("Add", ["thresholds", graph.constant([0.5], np.float32)]))


def window_ignored(graph: Graph) -> None:
    graph.replace("recent", graph.add("Sub", ["recent", "recent"]))


def evicts_the_newest(graph: Graph) -> None:
    """The slots that do not fit go from the end, not from behind the sinks."""
    graph.maker("skip").input[2] = graph.constant(0, np.int64)
    graph.maker("exists").input[1] = graph.add("Sub", ["clustered_column", "evicted_column"])


def chunks_ignored(graph: Graph) -> None:
    """Slots merge across semantic chunks."""
    made = {name for node in graph.graph.node for name in node.output}
    # A width of one chunk is optimised away.
    chunk = "wide_chunk" if "wide_chunk" in made else "chunk_number"
    graph.replace(chunk, graph.add("Sub", [chunk, chunk]))


def sinks_ignored(graph: Graph) -> None:
    graph.replace("sinks", graph.add("Sub", ["sinks", "sinks"]))


def cluster_size_lost(graph: Graph) -> None:
    """Cores count as one token."""
    graph.replace_output("slot_bias_out", lambda right: graph.add("Sub", ["slot_bias", "slot_bias"]))


def length_out_off_by_one(graph: Graph) -> None:
    one = graph.constant([1], np.int64)
    graph.replace_output("length_out", lambda right: graph.add("Sub", [right, one]))


def window_dropped(graph: Graph) -> None:
    """A layer with a sliding window sees everything."""
    if graph.is_gqa:
        for attribute in graph.attention.attribute:
            if attribute.name == "local_window_size":
                attribute.i = -1
    else:
        mask = graph.mask()
        mask.input[0] = graph.maker(mask.input[0]).input[0]


def logits_index_wrong(graph: Graph) -> None:
    """Logits of the row before the one that was asked for."""
    before = graph.add("Sub", ["logits_index", graph.constant([[1]], np.int64)])
    graph.replace("logits_index", graph.add("Max", [before, graph.constant([[0]], np.int64)]))


@dataclass(frozen=True)
class Mutation:
    """A mistake, where validation must say it is, and what it may call it.

    Attributes:
        layer: that the bisection names; None: before the layers, or after them.
        what: words of which the bisection's `what` has one; for "aliases", of the alias check's sentence.
        as_shipped: the check of TensorRT's float16 graph, as it is, must fail too. Not where a mistake shows only once
            something is merged, and then moves the next token's distribution less than rounding may.
        bundle: fixture of the bundle that is broken.
    """

    make: Callable[[Graph], None]
    layer: int | None
    what: tuple[str, ...]
    graph: str = "decoder"
    aliases: bool = False
    as_shipped: bool = True
    bundle: str = "both_targets"


_CHOICE = ("level", "length", "slots", "evicted")

MUTATIONS = {
    mutation.make.__name__: mutation
    for mutation in (
        Mutation(bias_not_added, 1, ("attention output",), as_shipped=False),
        Mutation(mask_dropped, 1, ("attention output",)),
        Mutation(length_ignored, 1, ("cache append (key)",)),
        Mutation(write_index_off_by_one, 1, ("cache append (key)",)),
        Mutation(keys_and_values_swapped, 1, ("cache append (key)",)),
        Mutation(layers_swapped, 0, ("cache append (key)",)),
        Mutation(position_is_length, None, ("output of rotary_emb",)),
        Mutation(position_off_by_one, None, ("output of rotary_emb",)),
        Mutation(reader_after_updater, None, ("may read the cache after",), aliases=True),
        Mutation(scale_changed, 1, ("attention output",)),
        Mutation(key_not_rotated, 1, ("key",)),
        Mutation(layer_scrambled, 1, ("output of mlp.up_proj",)),
        Mutation(head_mapping_wrong, 1, ("output of self_attn.q_proj",)),
        Mutation(input_of_another_layer, 1, ("value", "output of self_attn.v_proj")),
        Mutation(window_dropped, 1, ("attention output",), bundle="windowed"),
        Mutation(logits_index_wrong, None, ("logits", "output of lm_head")),
        Mutation(thresholds_ignored, 0, _CHOICE, "compressor"),
        Mutation(window_ignored, 0, _CHOICE, "compressor"),
        Mutation(evicts_the_newest, 0, ("slots",), "compressor"),
        Mutation(chunks_ignored, 0, _CHOICE, "compressor"),
        Mutation(sinks_ignored, 0, _CHOICE, "compressor"),
        Mutation(cluster_size_lost, 0, ("bias",), "compressor", as_shipped=False),
        Mutation(length_out_off_by_one, 0, ("length",), "compressor"),
    )
}
"""By name."""
