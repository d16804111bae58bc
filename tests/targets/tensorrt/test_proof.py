"""The proof on networks as data, one thing broken at a time. Real networks are in test_worker.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from semkv_deploy.errors import SemkvError
from semkv_deploy.targets.tensorrt.proof import Layer, check_inputs_are_used, prove

Layers = list[Layer]


def network(count: int = 2) -> tuple[Layers, list[tuple[str, str]], dict[str, str]]:
    """Layers as TensorRT-RTX 1.7.1 names them, with what was promised and the alias map."""
    layers: Layers = []
    promised: list[tuple[str, str]] = []
    aliases: dict[str, str] = {}
    hidden = "input"
    for i in range(count):
        for part in ("key", "value"):
            past, present, node = f"past.{i:02}.{part}", f"present.{i:02}.{part}", f"layers.{i:02}.{part}_append"
            layers.append(Layer("CAST", f"ONNXTRT_castHelper_{len(layers)}", ("length",), (f"w{i}{part}",)))
            layers.append(of(node, "KV_CACHE_UPDATE", (past, hidden, f"w{i}{part}"), (present,)))
            aliases[past] = present
            promised.append(("KV_CACHE_UPDATE", node))
        node = f"layers.{i:02}.attention"
        operands = (hidden, f"present.{i:02}.key", f"present.{i:02}.value")
        layers.append(Layer("ATTENTION_INPUT", f"{node}_AttentionInput", operands, (f"a{i}",)))
        layers.append(of(node, "ATTENTION_OUTPUT", (f"a{i}",), (f"hidden{i}",), name=f"{node}_AttentionOutput"))
        promised.append(("ATTENTION_INPUT", node))
        hidden = f"hidden{i}"
    return layers, promised, aliases


def of(node: str, kind: str, inputs: tuple[str, ...], outputs: tuple[str, ...], name: str = "") -> Layer:
    return Layer(kind, name or node, inputs, outputs, f"[ONNX Layer: {node}]")


def find(layers: Layers, name: str) -> int:
    return next(i for i, layer in enumerate(layers) if layer.name == name)


def change(layer: str, /, **fields: object) -> Callable[[Layers], None]:
    def mutate(layers: Layers) -> None:
        i = find(layers, layer)
        layers[i] = layers[i]._replace(**fields)

    return mutate


def add(layer: Layer) -> Callable[[Layers], None]:
    return lambda layers: layers.append(layer)


def drop(name: str) -> Callable[[Layers], None]:
    def mutate(layers: Layers) -> None:
        del layers[find(layers, name)]

    return mutate


def test_what_was_promised_is_proved() -> None:
    layers, promised, aliases = network(30)
    proof = prove(layers, promised, aliases, where="decoder.onnx")
    assert proof.kinds == {"KV_CACHE_UPDATE": 60, "ATTENTION_INPUT": 30}
    assert proof.aliases == aliases and proof.plugin_aliases == {}
    assert proof.per_layer() == {f"layers.{i:02}": {"KV_CACHE_UPDATE": 2, "ATTENTION_INPUT": 1} for i in range(30)}


APPEND, ATTENTION = "layers.01.key_append", "layers.01.attention"
MUTATIONS = {
    "append became a scatter": (change(APPEND, kind="SCATTER"), [APPEND, "one KV_CACHE_UPDATE", "1 SCATTER"]),
    "append is gone": (drop(APPEND), [APPEND, "no layer of that node", "TensorScatter"]),
    "append of one node twice": (
        add(of(APPEND, "KV_CACHE_UPDATE", ("past.01.key", "x", "w"), ("present.01.key",), name=f"{APPEND}_2")),
        [APPEND, "2 KV_CACHE_UPDATE", "name of its own"],
    ),
    "append of another node": (
        add(of("other", "KV_CACHE_UPDATE", ("past.01.key", "x", "w"), ("present.01.key",))),
        ["node other", "did not promise"],
    ),
    "append gives the other cache": (
        change(APPEND, outputs=("present.01.value",)),
        [APPEND, "past.01.key -> present.01.key", "past.01.key -> present.01.value"],
    ),
    "append gives another layer's cache": (change(APPEND, outputs=("present.00.key",)), [APPEND, "present.00.key"]),
    "append of no cache input": (change(APPEND, inputs=("copy", "x", "w")), [APPEND, "no alias pair"]),
    "attention decomposed": (
        change(f"{ATTENTION}_AttentionInput", kind="MATRIX_MULTIPLY", name=ATTENTION),
        [ATTENTION, "one ATTENTION_INPUT", "1 MATRIX_MULTIPLY", "inspect --lint"],
    ),
    "attention is gone": (drop(f"{ATTENTION}_AttentionInput"), [ATTENTION, "1 ATTENTION_OUTPUT"]),
    "attention without its end": (drop(f"{ATTENTION}_AttentionOutput"), [ATTENTION, "has no end"]),
    "attention that nobody promised": (
        add(Layer("ATTENTION_INPUT", "other_AttentionInput", ("q", "k", "v"), ("o",))),
        ["node other,", "did not promise"],
    ),
    "plugin that nobody promised": (
        add(Layer("PLUGIN_V3", "other", ("q",), ("o",), "", "semkv::NexusAttention")),
        ["node other,", "semkv::NexusAttention"],
    ),
    "old plugin that nobody promised": (add(Layer("PLUGIN_V2", "other", ("q",), ("o",))), ["node other,"]),
    "attention inlined from a function": (
        change(
            f"{ATTENTION}_AttentionInput", kind="SOFTMAX", metadata=f"[ONNX Layer: body | {ATTENTION} (NexusAttention)]"
        ),
        [ATTENTION, "inlined the function body", "1 SOFTMAX", "--plugin-library"],
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutated_network_is_refused(name: str) -> None:
    mutate, words = MUTATIONS[name]
    layers, promised, aliases = network()
    mutate(layers)
    with pytest.raises(SemkvError) as caught:
        prove(layers, promised, aliases, where="decoder.onnx")
    for word in ["decoder.onnx", *words]:
        assert word in str(caught.value), (word, str(caught.value))


def test_every_promise_and_every_alias_counts() -> None:
    """Each promise left out, and each alias pair left out or added, is an error."""
    layers, promised, aliases = network()
    for i in range(len(promised)):
        with pytest.raises(SemkvError, match="did not promise"):
            prove(layers, promised[:i] + promised[i + 1 :], aliases, where="g")
    for name in aliases:
        with pytest.raises(SemkvError, match="no alias pair"):
            prove(layers, promised, {k: v for k, v in aliases.items() if k != name}, where="g")
    with pytest.raises(SemkvError, match=r"g: past\.02\.key: no layer of the network updates this cache in place"):
        prove(layers, promised, aliases | {"past.02.key": "present.02.key"}, where="g")


def test_other_kinds_may_be_promised_and_need_not_be() -> None:
    """A decomposed attention is promised as its first product; other products are nobody's business."""
    layers = [of("layers.00.attention", "MATRIX_MULTIPLY", ("q", "k"), ("p",)), of("m", "MATRIX_MULTIPLY", (), ())]
    assert prove(layers, [("MATRIX_MULTIPLY", "layers.00.attention")], {}, where="g").kinds == {"MATRIX_MULTIPLY": 1}
    with pytest.raises(SemkvError, match=r"layers\.01\.attention"):
        prove(layers, [("MATRIX_MULTIPLY", "layers.01.attention")], {}, where="g")


def test_plugin_joins_its_caches() -> None:
    plugin = of(
        "layers.00.attention", "PLUGIN_V3", ("q", "past.key", "past.value"), ("o", "present.key", "present.value")
    )
    promised, aliases = (
        [("PLUGIN_V3", "layers.00.attention")],
        {"past.key": "present.key", "past.value": "present.value"},
    )
    proof = prove([plugin], promised, aliases, where="g")
    assert proof.plugin_aliases == aliases and proof.aliases == {}
    with pytest.raises(SemkvError, match=r"past\.value: no layer of the network updates this cache"):
        prove([plugin._replace(inputs=("q", "past.key"))], promised, aliases, where="g")
    function = Layer("CAST", "x", (), (), "[ONNX Layer: x | layers.00.attention (NexusAttention)]")
    with pytest.raises(SemkvError, match=r"inlined the function body of node layers\.00\.attention"):
        prove([function], promised, {}, where="g")


def test_node_of_a_layer() -> None:
    assert Layer("CAST", "n_3", (), (), "[ONNX Layer: n]").nodes == ["n"]
    assert Layer("CAST", "n", (), (), "[ONNX Layer: i | m (F) | o (G)]").nodes == ["i", "m", "o"]
    assert Layer("ATTENTION_INPUT", "a.b_AttentionInput", (), ()).nodes == ["a.b"]
    assert Layer("CAST", "ONNXTRT_castHelper_3", (), ()).nodes == ["ONNXTRT_castHelper_3"]


def test_inputs_must_reach_an_output() -> None:
    layers = [
        Layer("CAST", "lengths cast", ("lengths",), ("dead",)),
        Layer("ELEMENTWISE", "sum", ("x", "y"), ("out",)),
        Layer("TRIP_LIMIT", "loop", ("count",), ()),
    ]
    check_inputs_are_used(layers, ["x", "y", "count", "out"], ["out"], where="g")
    with pytest.raises(SemkvError, match="g: TensorRT ignores the input lengths"):
        check_inputs_are_used(layers, ["x", "lengths"], ["out"], where="g")
