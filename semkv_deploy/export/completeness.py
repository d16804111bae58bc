"""Whether what was loaded is the whole checkpoint: every tensor there, of the right shape, finite, and none left over.

transformers fills what a checkpoint lacks with random numbers and drops what the model has no place for, with a log
line each; a model exported from that answers nonsense without a word.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import torch

from semkv_deploy.errors import SemkvError

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NAMED = 3
"""How many tensors a sentence names."""

_RECOMPUTED = re.compile(r"(^|\.)(inv_freq|position_ids|masked_bias|attn\.bias|attention\.bias)$")
"""Buffers that old checkpoints stored and models now compute."""

_FLOATS = re.compile(r"B?F\d")
"""Beginnings of the names that safetensors has for floating-point types."""

_QUANTIZED = re.compile(
    r"(qweight|qzeros|g_idx|weight_scale(_inv)?|input_scale|weight_packed|weight_shape|_blocks|_scales|absmax|scales|SCB"
    r"|quant_map|quant_state\.\w+|zero_point|nested_absmax)$"
)
"""Ends of the names under which quantised checkpoints store codes and scales."""


def check_loading(where: object, model: PreTrainedModel, info: Mapping[str, Any]) -> None:
    """Checks what transformers reports about a load (`output_loading_info`).

    Raises:
        SemkvError: naming tensors that are missing, of another shape, quantised, or left over.
    """
    errors = info.get("error_msgs") or []
    if errors:
        raise SemkvError("weights cannot be loaded", where=where, got=_short(str(errors[0])))
    unexpected = [name for name in info.get("unexpected_keys") or () if not _RECOMPUTED.search(name)]
    if quantized := [name for name in unexpected if _QUANTIZED.search(name)]:
        raise SemkvError(
            "the weights are quantised in a form that would be read as plain numbers",
            where=where,
            got=_names(quantized),
            fix="give the original checkpoint, or a GGUF file of it",
        )
    if mismatched := [str(entry[0]) for entry in info.get("mismatched_keys") or ()]:
        raise SemkvError(
            f"{_count(mismatched)} not the shape that config.json says",
            where=where,
            got=_names(mismatched),
            fix="use the config.json that belongs to these weights",
        )
    if missing := sorted(info.get("missing_keys") or ()):
        raise SemkvError(
            f"{_count(missing)} not in the checkpoint",
            where=where,
            expected="every weight of the model",
            got=f"no {_names(missing)}",
            fix="download the checkpoint again, all of its files",
        )
    if left := _belonging(unexpected, model):
        raise SemkvError(
            f"{_count(left)} in the checkpoint, and the model has no place for {'it' if len(left) == 1 else 'them'}",
            where=where,
            got=_names(left),
            fix="use the config.json that belongs to these weights",
        )


def _belonging(names: Iterable[str], model: PreTrainedModel) -> list[str]:
    """Left-over tensors that belong to the decoder's own layers.

    Others (a vision tower, a reward head, layers for speculative decoding) are another model's business.
    """
    modules = {name for name, _ in model.named_modules() if name}
    roots = {"", model.base_model_prefix, f"{model.base_model_prefix}.language_model"}
    belonging = []
    for name in names:
        parts = name.split(".")
        holders = (".".join(parts[:count]) for count in range(len(parts) - 1, 0, -1))
        holder = next((each for each in holders if each in modules), "")
        if holder not in roots:
            belonging.append(name)
    return sorted(belonging)


def check_plain_weights(where: object, model: PreTrainedModel) -> None:
    """Checks that weights are float32 numbers and all of them finite.

    Raises:
        SemkvError: naming a tensor that is packed (a quantised layer), not a number, or infinite.
    """
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise SemkvError("a weight was not loaded", where=where, got=name)
        if isinstance(tensor, torch.nn.Parameter) and tensor.dtype != torch.float32:
            raise SemkvError(
                "the weights are quantised",
                where=where,
                expected="float32 after loading",
                got=f"{name} of {str(tensor.dtype).removeprefix('torch.')}",
                fix="give the original checkpoint, or a GGUF file of it",
            )
        if tensor.is_floating_point() and tensor.numel() and not _finite(tensor):
            raise SemkvError(
                "a weight is not a finite number",
                where=where,
                got=f"{_kinds(tensor)} in {name}",
                fix="download the checkpoint again, or train it again",
            )


def check_stored_types(folder: Path) -> None:
    """Checks that a checkpoint stores its weights as floating-point numbers.

    transformers converts whatever is stored to the type that is asked for, integer codes of quantised weights too.

    Raises:
        SemkvError: naming the weights that are stored as integers.
    """
    from safetensors import safe_open

    integers = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                kind = file.get_slice(name).get_dtype()
                if name.endswith((".weight", ".bias")) and not _FLOATS.match(kind) and not _RECOMPUTED.search(name):
                    integers.append(f"{name} of {kind}")
    if integers:
        raise SemkvError(
            "the weights are quantised",
            where=folder,
            expected="floating-point numbers",
            got=_names(integers),
            fix="give the original checkpoint, or a GGUF file of it",
        )


def _finite(tensor: torch.Tensor) -> bool:
    # Least and greatest carry NaN along, and make no copy of the tensor.
    return all(bool(torch.isfinite(value)) for value in torch.aminmax(tensor))


def _kinds(tensor: torch.Tensor) -> str:
    bad = int((~torch.isfinite(tensor)).sum())
    return f"{bad} of {tensor.numel()} values NaN or infinite"


def check_vocabulary(where: object, tokenizer: PreTrainedTokenizerBase, vocab_size: int, ends: Collection[int]) -> None:
    """Checks that every id that text can become has a row in the model's embedding.

    A special token beyond the model is let pass when neither the chat template nor an end of text is one: some models
    ship with one for images. Text that spells it is refused when it is encoded.

    Args:
        ends: ids that end texts and turns.

    Raises:
        SemkvError: naming the tokens that the model does not have.
    """
    beyond = {token: name for name, token in tokenizer.get_vocab().items() if token >= vocab_size}
    if not beyond:
        return
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    template = str(tokenizer.chat_template or "")
    reached = [
        name for token, name in sorted(beyond.items()) if token not in special or token in ends or name in template
    ]
    if reached:
        raise SemkvError(
            "the tokenizer has tokens that the model does not have",
            where=where,
            expected=f"ids below {vocab_size}",
            got=f"{len(beyond)} beyond, such as {_names(reached)}",
            fix="resize the model to its tokenizer (model.resize_token_embeddings), or give the tokenizer it was made"
            " with",
        )


def check_index(folder: Path) -> None:
    """Checks that the weight index of a checkpoint names files of its own folder.

    Raises:
        SemkvError: when an index is no index, or names a file elsewhere or one that is not there.
    """
    import json

    for path in sorted(folder.glob("*.index.json")):
        try:
            weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            files = sorted(set(weight_map.values()))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise SemkvError(
                "not an index of weights", where=path, expected="a weight_map", fix="download it again"
            ) from None
        for name in files:
            if not isinstance(name, str) or not _plain_name(name):
                raise SemkvError(
                    "the index names a file outside the checkpoint's folder",
                    where=path,
                    expected="the names of files beside it",
                    got=_short(repr(name)),
                )
            if not (folder / name).is_file():
                raise SemkvError(
                    "the index names a file that is not there",
                    where=path,
                    got=_short(name),
                    fix="download all files of the checkpoint",
                )


def _plain_name(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return bool(parts) and not name.startswith("/") and "\\" not in name and ".." not in parts and ":" not in name


def _count(names: Collection[str]) -> str:
    return "1 tensor is" if len(names) == 1 else f"{len(names)} tensors are"


def _names(names: Collection[str]) -> str:
    listed = sorted(names)
    more = f" and {len(listed) - NAMED} more" if len(listed) > NAMED else ""
    return _short(", ".join(listed[:NAMED]) + more)


def _short(text: str, limit: int = 300) -> str:
    return text if len(text) <= limit else text[:limit] + "…"
