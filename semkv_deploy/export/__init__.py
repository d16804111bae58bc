"""Frontends: a checkpoint becomes a portable decoder graph, its tokenizer, and what the later stages must know.

An export directory holds `decoder.onnx` (+ `decoder.onnx.data`), `tokenizer/`, `model.json` and `delimiters.json`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from semkv_deploy.errors import SemkvError
from semkv_deploy.model.exported import (
    COMPRESSOR,
    DECODER,
    DELIMITERS,
    FACTS,
    TOKENIZER,
    TOKENIZER_FILES,
    is_tokenizer_file,
)

if TYPE_CHECKING:
    from semkv_deploy.methods.base import Method
    from semkv_deploy.model.config import ModelFacts

Progress = Callable[[str, float | None], None]
"""Called with what is being done, and the share of it that is done (None: unknown)."""


def export_model(
    source: Path | str,
    out: Path | str,
    method: Method,
    *,
    force: bool = False,
    progress: Progress = lambda what, share: None,
) -> ModelFacts:
    """Exports a checkpoint with a method's compressor; `out` appears only when all of it is written.

    Args:
        source: a directory with config.json, a .gguf file, or a hub id.
        out: directory to write.
        method: whose compressor graph goes beside the decoder, if it has one.
        force: replace `out` when it is there.

    Raises:
        SemkvError: as `export_checkpoint`, or when `out` cannot be written.
    """
    from semkv_deploy.bundle import new_directory
    from semkv_deploy.bundle.own import foreign

    source = str(source)
    with new_directory(Path(out), force=force, foreign=foreign, sources=local_source(source)) as root:
        facts = export_checkpoint(source, root, progress)
        if method.compresses:
            (root / COMPRESSOR).write_bytes(method.compressor(facts).SerializeToString(deterministic=True))
    return facts


def export_checkpoint(source: str, out: Path, progress: Progress = lambda what, share: None) -> ModelFacts:
    """Exports a decoder LLM to portable ONNX.

    Args:
        source: a directory with config.json, a .gguf file, or a hub id.
        out: an existing empty directory; the caller renames it into place when all is well.

    Raises:
        SemkvError: when the checkpoint cannot be loaded, or its architecture is not supported.
    """
    if not out.is_dir() or any(out.iterdir()):
        raise SemkvError("the export directory must exist and be empty", where=out)
    progress("loading the checkpoint", None)

    from semkv_deploy.export.checkpoint import load_checkpoint
    from semkv_deploy.export.completeness import check_vocabulary
    from semkv_deploy.export.config import model_facts
    from semkv_deploy.export.decoder import export_decoder
    from semkv_deploy.export.delimiters import find_delimiters
    from semkv_deploy.graph.files import write_model

    checkpoint = load_checkpoint(source)
    facts = model_facts(checkpoint.model, checkpoint.tokenizer, checkpoint.name)
    check_vocabulary(source, checkpoint.tokenizer, facts.vocab_size, facts.eos_token_ids)
    progress("tracing the decoder", None)
    graph = export_decoder(checkpoint.model)
    progress("writing the decoder", None)
    write_model(graph, out / DECODER)
    checkpoint.tokenizer.save_pretrained(out / TOKENIZER)
    _check_known(out / TOKENIZER)
    find_delimiters(checkpoint.tokenizer).write(out / DELIMITERS)
    facts.write(out / FACTS)
    return facts


def local_source(source: str) -> list[Path]:
    """The path of a checkpoint that is no hub id, so that it is not replaced by what is made of it."""
    path = Path(source).expanduser()
    return [path] if path.exists() else []


def _check_known(folder: Path) -> None:
    """Fails where a tokenizer has a file that `build` would not copy: without it the bundle's would be another one."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not is_tokenizer_file(path.relative_to(folder).as_posix()):
            raise SemkvError(
                "the tokenizer has a file that is not known",
                where=path.name,
                expected=", ".join(TOKENIZER_FILES),
                fix="save the checkpoint's tokenizer as tokenizer.json with transformers' save_pretrained",
            )
