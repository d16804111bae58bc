"""Texts of several domains as the uncompressed model reads them, queries included: what DD-Select scores delimiters on.

Queries are outputs of no decoder that a bundle has, so the portable decoder is lowered once more with those of some
layers as outputs.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from semkv_deploy.compiler.calibrate import MAX_TOKENS, PREFILL_CHUNK, decoder_engine
from semkv_deploy.errors import SemkvError
from semkv_deploy.graph.editing import attribute
from semkv_deploy.methods.attention_nodes import required_attention_nodes
from semkv_deploy.methods.dd_select import DelimiterTable, DomainText, LayerAttention, Regions
from semkv_deploy.methods.layout import DECODE
from semkv_deploy.model.blocks import BlockRule
from semkv_deploy.model.cache_groups import one_a_layer
from semkv_deploy.model.delimiters import CLOSERS, Delimiters
from semkv_deploy.model.names import number_tag
from semkv_deploy.runtime.tokens import load_tokenizer
from semkv_deploy.targets.onnxruntime.build import lower_decoder, save_decoder

if TYPE_CHECKING:
    import onnx_ir as ir

    from semkv_deploy.methods import Method
    from semkv_deploy.model.config import ModelFacts
    from semkv_deploy.targets.build import Progress
    from semkv_deploy.targets.onnxruntime.engine import OnnxRuntimeEngine

DOMAINS = ("prose", "code", "chat", "cjk")
"""Domains for which a text ships with the package."""

MAX_LAYERS = 8
"""Layers whose attention is scored, evenly spread: all of SmolLM2's thirty say the same and take four times as long."""


def _query_name(layer: int, layers: int) -> str:
    """The rewritten decoder's output with a layer's queries."""
    return f"query.{number_tag(layer, layers)}"


def domain_texts(given: Mapping[str, str] | None = None) -> dict[str, str]:
    """Texts by domain: those that ship with the package, or the user's in place of all of them."""
    if given:
        return dict(given)
    folder = importlib.resources.files("semkv_deploy") / "data" / "domains"
    return {name: (folder / f"{name}.txt").read_text(encoding="utf-8") for name in DOMAINS}


def read_domain_texts(
    root: Path, model: ModelFacts, method: Method, texts: Mapping[str, str] | None, progress: Progress
) -> list[DomainText]:
    """What DD-Select scores, of a bundle that is being written: see `domain_texts`.

    Raises:
        SemkvError: when a text is too short, or no layer sees what is far away.
    """
    given = domain_texts(texts)
    method.check_domains(list(given))
    tokenizer = load_tokenizer(root)
    tokens = domain_tokens(tokenizer, model, given, method.regions)
    progress("reading texts of several domains", 0.0)
    return read_domains(
        root / "onnx" / "decoder.onnx",
        root / "work",
        model,
        tokenizer,
        Delimiters.read(root / "delimiters.json"),
        tokens,
        lambda share: progress("reading texts of several domains", share),
    )


def check_table(table: DelimiterTable, method: Method, model: ModelFacts) -> None:
    """Fails where weights of delimiters are not for a method, or of another model.

    Raises:
        SemkvError: naming both.
    """
    if not method.reads_domains:
        raise SemkvError(
            "the method weighs no delimiters",
            where="--calibration",
            expected="--method dynsplit with blocks=dynamic",
            got=method.kind,
        )
    method.check_domains([domain.name for domain in table.domains])
    if table.vocab_size != model.vocab_size:
        raise SemkvError(
            "the calibration is of a model with another vocabulary",
            where="--calibration",
            expected=f"{model.vocab_size} tokens",
            got=table.vocab_size,
            fix="calibrate this one: semkv-deploy calibrate",
        )


def read_table(path: Path) -> DelimiterTable:
    """What `semkv-deploy calibrate` wrote.

    Raises:
        SemkvError: when there is no such file, or it is another.
    """
    try:
        table = DelimiterTable.model_validate_json(path.read_bytes())
        # What contracts make of it is checked here, where the file can be named.
        BlockRule(base=1, search=0, token_ids=table.token_ids, domains=table.domains)
        return table
    except (OSError, ValueError) as error:
        raise SemkvError(
            "not a calibration of delimiters",
            where=f"--calibration {path}",
            expected="a file that semkv-deploy calibrate wrote",
            got=str(error).splitlines()[0],
        ) from None


def domain_tokens(
    tokenizer: Any, model: ModelFacts, texts: Mapping[str, str], regions: Regions
) -> dict[str, list[int]]:
    """Texts as token ids, 1,024 of each at most.

    Raises:
        SemkvError: when one is too short.
    """
    least = 2 * (regions.retained + regions.future)
    tokens = {}
    for domain, text in texts.items():
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False)[: min(MAX_TOKENS, model.max_position)]
        if len(ids) < least:
            raise SemkvError(
                "too short to calibrate on",
                where=f"--text {domain}",
                expected=f"{least} tokens or more: twice the regions retained and future",
                got=len(ids),
                fix="give a longer text",
            )
        tokens[domain] = ids
    return tokens


def scored_layers(model: ModelFacts) -> list[int]:
    """Numbers of the layers whose attention is scored: without a sliding window, evenly spread.

    Raises:
        SemkvError: when every layer has a window.
    """
    whole = [layer for layer, window in enumerate(model.windows) if not window]
    if not whole:
        raise SemkvError(
            "every layer has a sliding window: nothing that is far away is looked at",
            where="method dynsplit",
            fix="cut blocks without weights: --method-option blocks=delimiters",
        )
    step = max(1, -(-len(whole) // MAX_LAYERS))
    return whole[step // 2 :: step]


def read_domains(
    portable: Path,
    folder: Path,
    model: ModelFacts,
    tokenizer: Any,
    delimiters: Delimiters,
    tokens: Mapping[str, Sequence[int]],
    progress: Callable[[float], None] = lambda share: None,
) -> list[DomainText]:
    """Reads each text once.

    Args:
        portable: a decoder with one cache group a layer.
        folder: where the lowered decoder is written; it is removed afterwards.
        tokens: by domain.
    """
    layers = scored_layers(model)
    constants: dict[int, tuple[float, float]] = {}

    def expose(decoder: ir.Model) -> None:
        for layer, node in enumerate(required_attention_nodes(decoder.graph)):
            if layer in layers:
                constants[layer] = attribute(node, "scale", 0.0), attribute(node, "softcap", 0.0)
                query = node.inputs[0]
                assert query is not None
                query.name = _query_name(layer, model.layers)
                decoder.graph.outputs.append(query)

    path = folder / "queries.onnx"
    save_decoder(lower_decoder(portable, bias="none", groups=model.layers, rewrite=expose), path)
    groups = one_a_layer(model.layers, model.kv_heads)
    engine = decoder_engine(path, model, groups, max(map(len, tokens.values())))
    ends = _ends_of_blocks(tokenizer, model, delimiters, {int(token) for ids in tokens.values() for token in ids})
    texts = []
    for number, (domain, ids) in enumerate(tokens.items()):
        queries = _queries(engine, ids, {layer: _query_name(layer, model.layers) for layer in layers})
        attention = [
            LayerAttention(queries[layer], engine.read("key", layer)[0, :, : len(ids)].copy(), *constants[layer])
            for layer in layers
        ]
        texts.append(DomainText(domain, np.array(ids, np.int64), ends[list(ids)], attention))
        progress((number + 1) / len(tokens))
    for file in folder.glob(f"{path.name}*"):
        file.unlink()
    return texts


def _queries(engine: OnnxRuntimeEngine, ids: Sequence[int], named: Mapping[int, str]) -> dict[int, Any]:
    """By layer `[Hq,n,D]`, from outputs of these names; afterwards the engine's caches hold the text."""
    pieces: dict[int, list[Any]] = {layer: [] for layer in named}
    for start in range(0, len(ids), PREFILL_CHUNK):
        piece = np.array(ids[start : start + PREFILL_CHUNK], np.int64)[None]
        within = np.arange(piece.shape[1])[None]
        outputs = engine.run(
            DECODE,
            {
                "input_ids": piece,
                "position_ids": start + within,
                "logits_index": within[:, -1:],
                "length": np.full((len(engine.contract.cache.groups), 1), start, np.int64),
            },
            row=0,
        )
        for layer, name in named.items():
            pieces[layer].append(outputs[name][0].copy())
    return {layer: np.concatenate(parts, 1) for layer, parts in pieces.items()}


def _ends_of_blocks(tokenizer: Any, model: ModelFacts, delimiters: Delimiters, occurring: set[int]) -> Any:
    """`[vocab]` bool: delimiters, and tokens of nothing but closing marks, which end a unit in code."""
    table = delimiters.table(model.vocab_size)
    for token in occurring:
        text = "".join(tokenizer.decode([token]).split())
        table[token] |= bool(text) and all(symbol in CLOSERS and symbol not in "\"'" for symbol in text)
    return table
