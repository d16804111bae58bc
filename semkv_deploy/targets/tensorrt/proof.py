"""Proves that TensorRT made of a graph what the lowering promised, before anything is built.

TensorRT drops, inlines and replaces nodes without a word. So its network is read after parsing: each promised layer
must be there once and come from its node, cache updates must join the two tensors of an alias pair, and there must be
no other such layer. Nothing here imports TensorRT.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from pydantic import BaseModel

from semkv_deploy.errors import SemkvError

PLUGIN_KINDS = ("PLUGIN_V3", "PLUGIN_V2", "PLUGIN")
PROMISED_ONLY = ("KV_CACHE_UPDATE", "ATTENTION_INPUT", *PLUGIN_KINDS)
"""Kinds of layers of which a network has the promised ones and no others."""

_ORIGIN = re.compile(r"\[ONNX Layer: (.*)\]", re.DOTALL)
_ATTENTION_INPUT = "_AttentionInput"


class Layer(NamedTuple):
    """One layer of a parsed network.

    Attributes:
        kind: of `trt.LayerType`.
        name: as TensorRT has it.
        inputs, outputs: names of tensors.
        metadata: TensorRT's record of the ONNX node: "[ONNX Layer: node]", or "[ONNX Layer: inner | outer (Function)]"
            for a node of the inlined body of `outer`. Attention inputs have none.
        plugin: "namespace::name" of a plugin layer; "": not known.
    """

    kind: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    metadata: str = ""
    plugin: str = ""

    @property
    def nodes(self) -> list[str]:
        """The ONNX nodes it comes from: its own, then those whose function bodies it lies in, innermost first."""
        match = _ORIGIN.fullmatch(self.metadata)
        if match is None:
            return [self.name.removesuffix(_ATTENTION_INPUT) if self.kind == "ATTENTION_INPUT" else self.name]
        own, *outer = match[1].split(" | ")
        return [own, *(name.rsplit(" (", 1)[0] for name in outer)]


class Proof(BaseModel):
    """What was proved of a network.

    Attributes:
        kinds: number of promised layers by kind.
        nodes: ONNX node -> kind of its layer.
        aliases: cache input -> output, joined by an in-place cache update.
        plugin_aliases: the same for caches that a plugin takes and gives; that it writes in place is its own word,
            which only an engine on a GPU can confirm.
    """

    kinds: dict[str, int]
    nodes: dict[str, str]
    aliases: dict[str, str]
    plugin_aliases: dict[str, str]

    def per_layer(self) -> dict[str, dict[str, int]]:
        """Number of promised layers by kind, by decoder layer ("layers.00"); "" for other nodes."""
        found: dict[str, Counter[str]] = {}
        for node, kind in self.nodes.items():
            match = re.match(r"layers\.\d+", node)
            found.setdefault(match[0] if match else "", Counter())[kind] += 1
        return {layer: dict(kinds) for layer, kinds in found.items()}


def prove(
    layers: Sequence[Layer], promised: Iterable[tuple[str, str]], aliases: Mapping[str, str], *, where: str
) -> Proof:
    """Compares a network with what was promised of it.

    Args:
        layers: of the network.
        promised: (kind, ONNX node) of layers that it must have.
        aliases: cache input -> output that must share a buffer.
        where: the graph's file name, for messages.

    Raises:
        SemkvError: naming the first node that became something else, a layer that nobody promised, or a cache that is
            not updated in place.
    """
    made: dict[str, list[Layer]] = {}
    for layer in layers:
        for node in layer.nodes[:1]:
            made.setdefault(node, []).append(layer)
    wanted = list(promised)
    for kind, node in wanted:
        _check_promise(kind, node, made.get(node, []), layers, where)
    _check_no_others(layers, wanted, where)
    proved, by_plugin = _check_aliases(layers, aliases, where)
    return Proof(
        kinds=dict(Counter(kind for kind, _ in wanted)),
        nodes={node: kind for kind, node in wanted},
        aliases=proved,
        plugin_aliases=by_plugin,
    )


def check_inputs_are_used(
    layers: Sequence[Layer], inputs: Sequence[str], outputs: Sequence[str], *, where: str
) -> None:
    """Fails for an input from which no output follows: the importer drops operands that it does not know.

    Raises:
        SemkvError: naming the input.
    """
    live = set(outputs)
    # Layers without outputs, such as a loop's trip limit, act by being there.
    pending = [name for layer in layers if not layer.outputs for name in layer.inputs] + list(outputs)
    maker = {output: layer for layer in layers for output in layer.outputs}
    while pending:
        name = pending.pop()
        live.add(name)
        if name in maker:
            pending += [source for source in maker[name].inputs if source not in live]
    for name in inputs:
        if name not in live:
            raise unused_input(name, where)


def unused_input(name: str, where: str) -> SemkvError:
    """The error for an input that TensorRT ignores."""
    return SemkvError(
        f"TensorRT ignores the input {name}",
        where=where,
        expected="every input to be used",
        fix="remove the input; if it is the nonpad_kv_seqlen of an Attention, put lengths in the mask instead",
    )


def _check_promise(kind: str, node: str, made: Sequence[Layer], layers: Sequence[Layer], where: str) -> None:
    count = sum(layer.kind == kind for layer in made)
    expected = f"one {kind} layer"
    if count > 1:
        raise SemkvError(
            f"node {node} became {count} layers of a kind",
            where=where,
            expected=expected,
            got=f"{count} {kind}",
            fix="give every node of the graph a name of its own",
        )
    if count == 1:
        _check_attention_is_whole(kind, node, made, where)
        return
    body = [layer for layer in layers if node in layer.nodes[1:]]
    if body:
        raise SemkvError(
            f"TensorRT inlined the function body of node {node} ({len(body)} layers)",
            where=where,
            expected=expected,
            got=_kinds(body),
            fix="load the plugin library (--plugin-library), and leave no local function of that name in the graph",
        )
    fixes = {
        "KV_CACHE_UPDATE": "give TensorScatter a graph input as cache, a graph output as result and a static capacity",
        "ATTENTION_INPUT": "run semkv-deploy inspect --lint: it says what keeps Attention from the fused layer",
        "PLUGIN_V3": "load the plugin library (--plugin-library) and give the node plugin_namespace and plugin_version",
    }
    raise SemkvError(
        f"node {node} is not in TensorRT's network as promised",
        where=where,
        expected=expected,
        got=_kinds(made) if made else "no layer of that node",
        fix=fixes.get(kind, "run semkv-deploy inspect --lint on the graph"),
    )


def _check_attention_is_whole(kind: str, node: str, made: Sequence[Layer], where: str) -> None:
    ends = sum(layer.kind == "ATTENTION_OUTPUT" for layer in made)
    if kind == "ATTENTION_INPUT" and ends != 1:
        raise SemkvError(
            f"the attention of node {node} has no end", where=where, expected="one ATTENTION_OUTPUT layer", got=ends
        )


def _check_no_others(layers: Sequence[Layer], promised: Sequence[tuple[str, str]], where: str) -> None:
    known = set(promised)
    for layer in layers:
        if layer.kind in PROMISED_ONLY and (layer.kind, layer.nodes[0]) not in known:
            what = layer.plugin or layer.kind
            raise SemkvError(
                f"TensorRT made a {layer.kind} layer of node {layer.nodes[0]}, which the lowering did not promise",
                where=where,
                expected="the promised layers and no others",
                got=what,
                fix="lower the node, or list it among the promised layers",
            )


def _check_aliases(
    layers: Sequence[Layer], aliases: Mapping[str, str], where: str
) -> tuple[dict[str, str], dict[str, str]]:
    proved: dict[str, str] = {}
    for layer in layers:
        if layer.kind != "KV_CACHE_UPDATE":
            continue
        source, result = layer.inputs[0], layer.outputs[0]
        if aliases.get(source) != result:
            raise SemkvError(
                f"node {layer.nodes[0]} appends to a cache and gives it as another",
                where=where,
                expected=f"{source} -> {aliases.get(source, 'no alias pair')}",
                got=f"{source} -> {result}",
                fix="connect each past_key_values input to the present output of the same name",
            )
        proved[source] = result
    by_plugin: dict[str, str] = {}
    for source, result in aliases.items():
        if source in proved:
            continue
        if any(layer.kind == "PLUGIN_V3" and source in layer.inputs and result in layer.outputs for layer in layers):
            by_plugin[source] = result
            continue
        raise SemkvError(
            "no layer of the network updates this cache in place",
            where=f"{where}: {source}",
            expected=f"a KV_CACHE_UPDATE or PLUGIN_V3 layer from {source} to {result}",
            got=_kinds([layer for layer in layers if result in layer.outputs]) or "none that gives it",
            fix="append with TensorScatter, or by a plugin",
        )
    return proved, by_plugin


def _kinds(layers: Iterable[Layer]) -> str:
    return " + ".join(f"{count} {kind}" for kind, count in sorted(Counter(layer.kind for layer in layers).items()))
