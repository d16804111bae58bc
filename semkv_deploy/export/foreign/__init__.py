"""Other people's ONNX decoders become exports: recognised by structure, proved against the original, or refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from semkv_deploy.model.config import ModelFacts

_WIDENED = "widened.onnx"
"""A float16 graph in float32, for as long as it is compared."""


def is_foreign(path: Path) -> bool:
    """Whether an ONNX file is a decoder that `import_decoder` is for: no operators of ours, and no export's files.

    Raises:
        SemkvError: when it is no ONNX file.
    """
    from semkv_deploy.graph.external import read_graph
    from semkv_deploy.model.exported import FACTS
    from semkv_deploy.ops import DOMAIN

    model = read_graph(path, expected="an ONNX file", fix="give decoder.onnx of an export, or a decoder's ONNX file")
    ours = any(node.domain == DOMAIN for node in model.graph.node)
    return not ours and not (path.parent / FACTS).exists()


def import_decoder(
    path: Path,
    out: Path,
    *,
    beside: Path | None = None,
    proof: bool = True,
    progress: Callable[[str, float | None], None] = lambda what, share: None,
) -> ModelFacts:
    """Writes an export of a stranger's decoder: `decoder.onnx`, `tokenizer/`, `model.json`, `delimiters.json`.

    Args:
        path: the graph; its weights lie beside it.
        out: an existing empty directory.
        beside: folder of configuration and tokenizer; None: the graph's.
        proof: compare the import with the original in ONNX Runtime.

    Raises:
        SemkvError: naming what is not recognised or not known, or where the import differs from the original.
    """
    import onnx_ir as ir

    from semkv_deploy.export.config import turn_end_ids
    from semkv_deploy.export.delimiters import find_delimiters
    from semkv_deploy.export.foreign.facts import Known, head_size, model_facts, read_configs
    from semkv_deploy.export.foreign.float16 import is_float16, widen
    from semkv_deploy.export.foreign.interface import find_interface
    from semkv_deploy.export.foreign.original import names_of
    from semkv_deploy.export.foreign.portable import to_portable
    from semkv_deploy.export.foreign.proof import check_import, check_widened
    from semkv_deploy.graph.files import write_model
    from semkv_deploy.model.exported import DECODER, DELIMITERS, FACTS, TOKENIZER, check_weights
    from semkv_deploy.model.tokenizer import read_tokenizer

    progress("reading the graph", None)
    check_weights(path)
    folder = path.resolve().parent if beside is None else beside.resolve()
    model = ir.load(path)
    read = path
    if narrow := is_float16(model):
        progress("float16 weights are read as float32: twice the bytes, where --weights does not quantise them", None)
        widen(model, path.name)
        read = out / _WIDENED
        write_model(model, read)
    roles = find_interface(model, path.name)
    known = Known(read_configs(folder), folder)
    tokenizer = read_tokenizer(folder)
    facts = model_facts(model, roles, known, folder.name, set(turn_end_ids(tokenizer)))
    names = names_of(roles)
    # Where a graph does not state them, the configuration does.
    layers = tuple(replace(layer, query_heads=facts.query_heads) for layer in roles.layers)
    roles, kind = replace(roles, layers=layers), layers[0].kind
    to_portable(model, roles, head_size(roles, known))
    progress("writing the decoder", None)
    write_model(model, out / DECODER)
    tokenizer.save_pretrained(out / TOKENIZER)
    find_delimiters(tokenizer).write(out / DELIMITERS)
    facts.write(out / FACTS)
    if proof:
        if narrow:
            progress("comparing the graph in float32 with that in float16", None)
            apart = check_widened(path, read, facts, names)
            progress(f"float32 and float16 are apart by {apart:.1e} of a logit", None)
        progress("comparing the import with the original", None)
        difference = check_import(read, out / DECODER, facts, names)
        progress(f"imported {facts.layers} x {kind}; largest difference {difference:.1e} of a logit", None)
    if narrow:
        for file in out.glob(f"{_WIDENED}*"):
            file.unlink()
    return facts


def recognised(path: Path) -> str | None:
    """What `import_decoder` would make of a stranger's decoder, in a sentence; None: it takes no tokens.

    Raises:
        SemkvError: naming what of its attention is not recognised.
    """
    import onnx_ir as ir

    from semkv_deploy.export.foreign.float16 import is_float16, widen
    from semkv_deploy.export.foreign.interface import find_interface

    if not is_foreign(path):
        return None
    model = ir.load(path)
    types = ""
    if is_float16(model):
        widen(model, path.name)
        types = "; float16, read as float32"
    if not any(value.name == "input_ids" for value in model.graph.inputs):
        return None
    roles = find_interface(model, path.name)
    windows = sorted({layer.window for layer in roles.layers if layer.window})
    window = f", windows of {', '.join(map(str, windows))}" if windows else ""
    positions = "counted" if roles.counted else "none"
    if roles.positions:
        positions = f"by {roles.positions.name}"
    if any(layer.turned_by for layer in roles.layers):
        positions = "in the node"
    return f"{len(roles.layers)} x {roles.layers[0].kind}{window}; positions: {positions}{types}"


def keeps_weights(decoder: Path) -> str | None:
    """The operator by which a portable decoder reads weights that came quantised, so that they stay; None: they are
    floats."""
    import onnx

    from semkv_deploy.graph.products import reads_quantised_weights

    return reads_quantised_weights(onnx.load(decoder, load_external_data=False).graph)


__all__ = ["import_decoder", "is_foreign", "keeps_weights", "recognised"]
