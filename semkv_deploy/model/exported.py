"""The directory `export` writes: checked before anything is built from it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from semkv_deploy.errors import SemkvError
from semkv_deploy.graph.external_data import external_faults
from semkv_deploy.model.config import ModelFacts
from semkv_deploy.ops import DOMAIN

if TYPE_CHECKING:
    import onnx

BESIDE_DECODER = ("model.json", "delimiters.json", "tokenizer")


def load_portable(path: Path) -> onnx.ModelProto:
    """A portable decoder graph without its weights, checked to be one.

    Raises:
        SemkvError: when the file is missing, not ONNX, has no `semkv` operators, or its weights are missing,
            truncated or elsewhere.
    """
    import onnx
    from google.protobuf.message import DecodeError

    if not path.is_file():
        raise SemkvError(
            "no such file", where=path, expected="decoder.onnx of an export, or a checkpoint", fix="check the path"
        )
    try:
        model = onnx.load(path, load_external_data=False)
        valid = bool(model.graph.node) and bool(model.opset_import)
    except DecodeError:
        valid = False
    if not valid:
        raise SemkvError("not an ONNX model", where=path, fix="give decoder.onnx as `semkv-deploy export` wrote it")
    if not any(node.domain == DOMAIN for node in model.graph.node):
        raise SemkvError(
            "no node of domain semkv: the cache of this graph cannot be compressed",
            where=path,
            expected="a graph written by `semkv-deploy export`",
            fix="export the checkpoint it was made from: semkv-deploy export <checkpoint> -o <dir>",
        )
    for name, fault in external_faults(model, path.parent):
        raise SemkvError(fault, where=f"{path}: {name}", fix="keep the files of an export together, or export again")
    return model


def open_export(decoder: Path) -> ModelFacts:
    """Facts of an export directory, after checking that it is whole.

    Raises:
        SemkvError: as `load_portable`, or naming what is missing beside the decoder.
    """
    load_portable(decoder)
    for name in BESIDE_DECODER:
        if not (decoder.parent / name).exists():
            raise SemkvError(
                f"{name} is missing beside it",
                where=decoder,
                fix="keep the files of an export together, or export again",
            )
    return ModelFacts.read(decoder.parent / "model.json")
