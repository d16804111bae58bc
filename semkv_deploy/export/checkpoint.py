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
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from semkv_deploy.errors import SemkvError
from semkv_deploy.export import gguf
from semkv_deploy.export.completeness import check_index, check_loading, check_plain_weights, check_stored_types
from semkv_deploy.model.config import check_sizes, named_sizes
from semkv_deploy.model.tokenizer import NO_CODE, cannot_load, check_tokenizer_config, loading_failed, no_hub

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_WANTED = "a directory with config.json, a .gguf file, or a hub id such as HuggingFaceTB/SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class Checkpoint:
    """A model in float32 and evaluation mode, its tokenizer, and the source's base name (never a path)."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str


def load_checkpoint(source: str) -> Checkpoint:
    """Loads `source`; GGUF weights are dequantised to float32. No code of the checkpoint's is run.

    Raises:
        SemkvError: when the path does not exist, is no checkpoint, is damaged or incomplete, or when a hub id cannot
            be fetched.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        folder = _checked_directory(path)
        check_tokenizer_config(folder)
        loaded = _load(source, path.resolve().name, str(folder), local_files_only=True)
        check_stored_types(folder)
        return loaded
    if path.is_file() or path.suffix.lower() == ".gguf":
        return _load_gguf(_checked_gguf(path))
    from huggingface_hub import try_to_load_from_cache

    looks_like_path = source.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(source)
    if looks_like_path:
        raise SemkvError("no such checkpoint", where=source, expected=_WANTED)
    loaded = _load(source, source.rsplit("/", 1)[-1], source, **_hub_options(source))
    cached = try_to_load_from_cache(source, "config.json")
    if isinstance(cached, str):
        check_stored_types(Path(cached).parent)
    return loaded


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
    if (path / "adapter_config.json").is_file():
        raise SemkvError(
            "the directory is an adapter (LoRA), which needs its base model",
            where=path,
            expected="a whole model",
            fix="merge it into its base first: PeftModel.merge_and_unload(), then save_pretrained",
        )
    if (path / "config.json").is_file():
        check_index(path)
        return path
    if (path / "decoder.onnx").is_file():
        raise SemkvError("the directory is an export", where=path, fix=f"give {path / 'decoder.onnx'}")
    if (path / "bundle.json").is_file():
        raise SemkvError("the directory is a bundle already built", where=path, fix="give what it was built from")
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
    header = gguf.read_header(path)
    gguf.check_parts(path, header)
    check_sizes(header.sizes, path)
    with _read_gguf_once(), _named_tensors() as names:
        checkpoint = _load(str(path), path.name, str(path.parent), gguf_file=path.name, local_files_only=True)
        _check_gguf_tensors(path, header, names)
    model: Any = checkpoint.model
    _apply_rope_factors(path, header, model)
    if header.end_token_ids and model.generation_config is not None:
        # transformers reads one end token; turns of a chat end with another.
        model.generation_config.eos_token_id = list(header.end_token_ids)
    return checkpoint


@contextmanager
def _named_tensors() -> Iterator[set[str]]:
    """Collects the GGUF names that transformers has a place for while it loads; none: it did not say."""
    reader: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    original, names = getattr(reader, "get_gguf_hf_weights_map", None), set[str]()
    if original is None:
        yield names
        return

    def noting(*arguments: Any, **options: Any) -> Any:
        found = original(*arguments, **options)
        names.update(found)
        return found

    try:
        reader.get_gguf_hf_weights_map = noting
        yield names
    finally:
        reader.get_gguf_hf_weights_map = original


def _check_gguf_tensors(path: Path, header: gguf.GgufHeader, names: set[str]) -> None:
    """Refuses a file with tensors that were passed over (mixtures of experts, which are renamed, are not judged)."""
    if not names or any("_exps" in tensor.name for tensor in header.tensors):
        return
    left = sorted(tensor.name for tensor in header.tensors if tensor.name not in names | {gguf.ROPE_FACTORS})
    if left:
        more = f" and {len(left) - 3} more" if len(left) > 3 else ""
        raise SemkvError(
            "the file has tensors that the model has no place for",
            where=path,
            got=", ".join(left[:3]) + more,
            fix="give the original checkpoint: its architecture is not read whole from a GGUF",
        )


def _apply_rope_factors(path: Path, header: gguf.GgufHeader, model: PreTrainedModel) -> None:
    """Divides the rotary frequencies by the file's factors, which transformers passes over."""
    entry = next((tensor for tensor in header.tensors if tensor.name == gguf.ROPE_FACTORS), None)
    if entry is None:
        return
    with path.open("rb") as file:
        file.seek(header.data_start + entry.offset)
        raw = file.read(entry.size)
    modules: list[Any] = list(model.modules())
    tables = [module for module in modules if isinstance(getattr(module, "inv_freq", None), torch.Tensor)]
    if entry.kind != 0 or any(len(table.inv_freq) * 4 != entry.size for table in tables):
        raise SemkvError(
            "its rotary factors do not fit the model", where=path, got=f"{gguf.ROPE_FACTORS} {list(entry.dims)}"
        )
    factors = torch.frombuffer(bytearray(raw), dtype=torch.float32)
    for table in tables:
        for name in ("inv_freq", "original_inv_freq"):
            if isinstance(getattr(table, name, None), torch.Tensor):
                setattr(table, name, getattr(table, name) / factors)


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
    """No progress bars and load reports of transformers' while ours is on; what they would say is checked."""
    shown, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    reader: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    bar = getattr(reader, "tqdm", None)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        if bar is not None:
            reader.tqdm = lambda items, **_: items
        yield
    finally:
        if bar is not None:
            reader.tqdm = bar
        transformers_logging.set_verbosity(level)
        if shown:
            transformers_logging.enable_progress_bar()


def _load(source: str, name: str, location: str, **options: Any) -> Checkpoint:
    with _quiet():
        try:
            with no_hub() if options.get("local_files_only") else nullcontext():
                if "gguf_file" not in options:  # whose header was checked
                    config = AutoConfig.from_pretrained(location, **NO_CODE, **options)
                    check_sizes(named_sizes(config), source)
                tokenizer = AutoTokenizer.from_pretrained(location, **NO_CODE, **options)
                loaded: Any = AutoModelForCausalLM.from_pretrained(
                    location,
                    dtype=torch.float32,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,
                    **NO_CODE,
                    **options,
                )
        except SemkvError:
            raise
        except BaseException as error:
            if not loading_failed(error):
                raise
            raise cannot_load("the checkpoint", source, error) from error
    model, info = loaded
    check_loading(source, model, info)
    check_plain_weights(source, model)
    return Checkpoint(model.eval().requires_grad_(False), tokenizer, name)
