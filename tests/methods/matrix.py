"""Every method, in the forms that differ in what is run: one row a form. Tests of methods, sessions, contracts and
bundles are parametrised over these, so that a new method is a row here."""

from __future__ import annotations

from semkv_deploy.methods import (
    METHODS,
    DynSplit,
    DynSplitSelect,
    Full,
    Importance,
    Method,
    SemantiCache,
    Sonic,
    StreamingLLM,
)

FORMS: dict[str, Method] = {
    "streaming-llm": StreamingLLM(),
    "streaming-llm, no sinks": StreamingLLM(sinks=0),
    "streaming-llm, at turns": StreamingLLM(compress_at="turn", sinks=6),
    "streaming-llm, isolated": StreamingLLM(turns="isolated"),
    "semanticache": SemantiCache(),
    "semanticache, no sinks": SemantiCache(sinks=0),
    "semanticache, by head": SemantiCache(cluster_by="head"),
    "semanticache, by head, at turns": SemantiCache(cluster_by="head", compress_at="turn", recent=0.3, sinks=2),
    "semanticache, by head, isolated at turns": SemantiCache(cluster_by="head", turns="isolated", compress_at="turn"),
    "semanticache, as cached": SemantiCache(merge_keys="cached"),
    "semanticache, as cached, by head": SemantiCache(merge_keys="cached", cluster_by="head", span=32),
    "semanticache, the paper's form": SemantiCache(form="paper"),
    "importance": Importance(fit="none"),
    "importance, at turns": Importance(fit="none", compress_at="turn", sinks=2),
    "importance, fitted": Importance(),
    "importance, fitted, isolated": Importance(turns="isolated"),
    "importance, predicted": Importance(queries="predicted"),
    "importance, predicted, at turns, no sinks": Importance(
        queries="predicted", compress_at="turn", sinks=0, recent=0.5
    ),
    "sonic": Sonic(kept=0.2, placement="spread"),
    "sonic, at turns, with a window": Sonic(kept=0.4, compress_at="turn", nexus_share=0.5, sinks=2),
    "dynsplit": DynSplit(),
    "dynsplit, predicted, at turns": DynSplit(queries="predicted", compress_at="turn", pool="max", block=32),
    "dynsplit, chosen of what stays": DynSplit(attend=48, recent_blocks=2),
    "dynsplit-select": DynSplitSelect(attend=64),
    "full": Full(),
}
"""Those that are learned lack their adapter: `tests.tiny.with_adapter` makes one for a model."""

OPTIONS: dict[str, Method] = {
    "importance, merged": Importance(fit="merge"),
    "importance predicted, merged": Importance(queries="predicted", fit="merge"),
    "importance, biases fitted": Importance(fit="bias"),
    "importance, biases fitted, isolated": Importance(fit="bias", turns="isolated"),
    "importance predicted, merged, isolated": Importance(queries="predicted", fit="merge", turns="isolated"),
    "semanticache, keys and values": SemantiCache(merge="keys_and_values"),
    "semanticache, centered": SemantiCache(merge="keys_and_values", center=True, delimiters="apart"),
    "dynsplit, predicted, mean, fixed blocks": DynSplit(queries="predicted", block=20, blocks="fixed"),
}
"""Forms that differ in the compressor's graph and in nothing else."""

COMPRESSING = {
    name: method
    for name, method in {**FORMS, **OPTIONS}.items()
    # A host names the slots that SONIC keeps: its program takes no target. Of what isolates turns only the methods that
    # fit or merge into what stays have another program.
    if method.compresses
    and not isinstance(method, Sonic)
    and (isinstance(method, Importance) or not getattr(method, "isolates", False))
}
"""Methods whose program finds by itself what to keep."""

assert {method.kind for method in FORMS.values()} == set(METHODS), "every method has a row"
