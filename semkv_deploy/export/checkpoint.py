"""Load a checkpoint: a directory as `save_pretrained` writes it, a `.gguf` file, or the id of a model on a hub."""

from __future__ import annotations

import functools
import importlib
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from semkv_deploy.errors import SemkvError
from semkv_deploy.model.tokenizer import NO_CODE, cannot_load, check_tokenizer_config, no_hub

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_WANTED = "a directory with config.json, a .gguf file, or a hub id such as HuggingFaceTB/SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class Checkpoint:
    """A model in float32 and evaluation mode, its tokenizer, and the source's base name (never a path)."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str


def load_checkpoint(source: str) -> Checkpoint:
    """Loads `source`; GGUF weights are dequantised to float32.

    Raises:
        SemkvError: when the path does not exist, is no checkpoint, is damaged, or when a hub id cannot be fetched.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        folder = _checked_directory(path)
        check_tokenizer_config(folder)
        return _load(source, path.resolve().name, str(folder), local_files_only=True)
    if path.is_file() or path.suffix.lower() == ".gguf":
        return _load_gguf(_checked_gguf(path))
    looks_like_path = source.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(source)
    if looks_like_path:
        raise SemkvError("no such checkpoint", where=source, expected=_WANTED)
    return _load(source, source.rsplit("/", 1)[-1], source, **_hub_options(source))


def _hub_options(repo: str) -> dict[str, Any]:
    """How to load a hub id: from the local cache alone when the hub is out of reach.

    One request decides, because transformers would retry every file for the better part of a minute.

    Raises:
        SemkvError: when the hub is out of reach and the cache lacks the model, and when the hub refuses the id.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        HfApi().model_info(repo, timeout=10)
        return {}
    except RepositoryNotFoundError as error:
        raise SemkvError(
            "no such checkpoint, here or on the hub",
            where=repo,
            expected=_WANTED,
            fix="check the id, and log in (hf auth login) if the model is private or gated",
        ) from error
    except Exception as error:
        if isinstance(try_to_load_from_cache(repo, "config.json"), str):
            return {"local_files_only": True}
        raise SemkvError(
            "the hub cannot be reached and the model is not in the local cache",
            where=repo,
            got=f"{type(error).__name__}: {error}",
            fix=f"run 'hf download {repo}' on a machine with a connection, copy the directory here and give its path",
        ) from error


def _checked_directory(path: Path) -> Path:
    if (path / "config.json").is_file():
        return path
    ggufs = sorted(file.name for file in path.glob("*.gguf"))
    if ggufs:
        raise SemkvError(
            "the directory has no config.json", where=path, got=", ".join(ggufs), fix="name the .gguf file"
        )
    raise SemkvError("the directory is no checkpoint", where=path, expected="a config.json in it", fix="check the path")


def _checked_gguf(path: Path) -> Path:
    if not path.is_file():
        raise SemkvError("no such file", where=path, expected=_WANTED)
    with path.open("rb") as file:
        start = file.read(8)
    if start[:4] != b"GGUF":
        raise SemkvError(
            "not a GGUF file",
            where=path,
            expected="it to start with 'GGUF'",
            got=repr(start[:4]),
            fix=f"give {_WANTED}",
        )
    version = struct.unpack("<I", start[4:])[0] if len(start) == 8 else None
    if version not in (2, 3):
        raise SemkvError("unknown GGUF version", where=path, expected="2 or 3", got=version)
    return path


def _load_gguf(path: Path) -> Checkpoint:
    with _read_gguf_once():
        return _load(str(path), path.name, str(path.parent), gguf_file=path.name, local_files_only=True)


@contextmanager
def _read_gguf_once() -> Iterator[None]:
    """transformers (5.23) parses a GGUF file's header four times, 5 s each for 49k tokens; parse it once.

    Also its table of tensor names, which it builds anew for every module of the model.
    """
    package: Any = importlib.import_module("gguf")
    originals = (package.GGUFReader, package.get_tensor_name_map)
    try:
        package.GGUFReader = functools.lru_cache(maxsize=1)(package.GGUFReader)
        package.get_tensor_name_map = functools.lru_cache(maxsize=4)(package.get_tensor_name_map)
        yield
    finally:
        package.GGUFReader, package.get_tensor_name_map = originals


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of transformers' while ours is on."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _load(source: str, name: str, location: str, **options: Any) -> Checkpoint:
    with _quiet():
        try:
            with no_hub() if options.get("local_files_only") else nullcontext():
                tokenizer = AutoTokenizer.from_pretrained(location, **NO_CODE, **options)
                model = AutoModelForCausalLM.from_pretrained(location, dtype=torch.float32, **NO_CODE, **options)
        except SemkvError:
            raise
        except Exception as error:
            raise cannot_load("the checkpoint", source, error) from error
    return Checkpoint(model.eval().requires_grad_(False), tokenizer, name)
