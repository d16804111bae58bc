"""The directory `export` writes: checked before anything is built from it."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from semkv_deploy.errors import SemkvError
from semkv_deploy.graph.external import external_tensors, is_inside, open_regular, read_graph
from semkv_deploy.graph.external_data import external_faults
from semkv_deploy.model.config import ModelFacts
from semkv_deploy.ops import DOMAIN

if TYPE_CHECKING:
    import onnx

DECODER = "decoder.onnx"
COMPRESSOR = "compressor.onnx"
TOKENIZER = "tokenizer"
FACTS = "model.json"
DELIMITERS = "delimiters.json"

BESIDE_DECODER = (FACTS, DELIMITERS, TOKENIZER)

EXPORT_FILES = (DECODER, f"{DECODER}.data", COMPRESSOR, FACTS, DELIMITERS)
"""Files that `export` writes beside the folder `tokenizer/`."""

TOKENIZER_FILES = (
    "added_tokens.json",
    "bpe.codes",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "sentencepiece.model",
    "special_tokens_map.json",
    "spiece.model",
    "spm.model",
    "tekken.json",
    "tiktoken.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
"""Names that transformers gives a tokenizer's files; others in the folder are neither read nor copied."""

TEMPLATES = "additional_chat_templates"
"""Folder beside a tokenizer's files, with one `.jinja` for each further template."""


def is_tokenizer_file(name: str) -> bool:
    """Whether a path below the tokenizer's folder is that of one of its files."""
    return name in TOKENIZER_FILES or re.fullmatch(rf"{TEMPLATES}/[\w.-]+\.jinja", name) is not None


def _tokenizer_files(folder: Path) -> list[str]:
    """Names of the files of the tokenizer in `folder`, links among them."""
    names = [name for name in TOKENIZER_FILES if os.path.lexists(folder / name)]
    templates = folder / TEMPLATES
    if templates.is_dir() and not templates.is_symlink():
        found = sorted(f"{TEMPLATES}/{name}" for name in os.listdir(templates))
        names += [name for name in found if is_tokenizer_file(name)]
    return names


def load_portable(path: Path) -> onnx.ModelProto:
    """A portable decoder graph without its weights, checked to be one.

    Raises:
        SemkvError: when the file is missing, not ONNX, has no `semkv` operators, or its weights are missing,
            truncated or elsewhere.
    """
    model = read_graph(
        path,
        expected="decoder.onnx of an export, or a checkpoint",
        fix="give decoder.onnx as `semkv-deploy export` wrote it",
    )
    if not any(node.domain == DOMAIN for node in model.graph.node):
        raise SemkvError(
            "no node of domain semkv: the cache of this graph cannot be compressed",
            where=path,
            expected="a graph written by `semkv-deploy export`",
            fix="export the checkpoint it was made from: semkv-deploy export <checkpoint> -o <dir>",
        )
    _check_data(model, path)
    return model


def check_weights(path: Path) -> None:
    """Compares the external data that any ONNX file names with what lies beside it.

    Raises:
        SemkvError: when the file is missing or not ONNX, or its weights are missing, truncated, elsewhere, or a file
            with several names.
    """
    model = read_graph(path, expected="an ONNX file", fix="give a decoder's ONNX file")
    _check_data(model, path)
    for location in sorted({tensor.location for tensor in external_tensors(model)}):
        names = (path.parent / location).stat().st_nlink
        if names > 1:
            raise SemkvError(
                "the weights are a file with several names (hard links), which ONNX's readers refuse",
                where=path.parent / location,
                expected="1 name",
                got=names,
                fix="give a copy of the file, or a symbolic link",
            )


def _check_data(model: onnx.ModelProto, path: Path) -> None:
    for tensor in external_tensors(model):
        if not is_inside(tensor.location):
            raise SemkvError(
                "its external data lies outside its folder",
                where=path,
                got=f"{tensor.location!r} of tensor {tensor.tensor}",
                fix="export the model again",
            )
        data = path.parent / tensor.location
        needed = tensor.offset + (tensor.length or 0)
        if not data.is_file():
            raise SemkvError("the weights are missing", where=data, fix=f"put it beside {path.name}, or export again")
        if data.stat().st_size < needed:
            raise SemkvError(
                "the weights are truncated",
                where=data,
                expected=f"at least {needed} bytes",
                got=f"{data.stat().st_size} bytes",
                fix="copy the file again, or export again",
            )
    for name, fault in external_faults(model, path.parent):
        raise SemkvError(fault, where=f"{path}: {name}", fix="keep the files of an export together, or export again")


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
    return ModelFacts.read(decoder.parent / FACTS)


def copy_export(decoder: Path, out: Path) -> None:
    """Copies the files of an export that are known by name to `out`; nothing else that lies beside them.

    The decoder becomes `decoder.onnx`; its external data keeps the name that the graph has for it. A compressor is not
    copied: `build` makes its own.

    Raises:
        SemkvError: when one of them is a link or no regular file.
    """
    import onnx

    def copy(name: str, target: str) -> None:
        (out / target).parent.mkdir(parents=True, exist_ok=True)
        with open_regular(decoder.parent, name) as source, (out / target).open("xb") as file:
            shutil.copyfileobj(source, file, 1 << 20)

    copy(decoder.name, DECODER)
    # Of the copy: what is read from here on.
    for name in sorted(
        {tensor.location for tensor in external_tensors(onnx.load(out / DECODER, load_external_data=False))}
    ):
        copy(name, name)
    tokenizer = [f"{TOKENIZER}/{name}" for name in _tokenizer_files(decoder.parent / TOKENIZER)]
    for name in (FACTS, DELIMITERS, *tokenizer):
        copy(name, name)
