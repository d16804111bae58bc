"""Facts of a stranger's model: of the configuration beside it and of the graph; what neither says is refused."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from pydantic import ValidationError

import semkv_deploy
from semkv_deploy.errors import SemkvError
from semkv_deploy.export.foreign.rotary import TABLE_ROWS, rotary_of, tables_in_graph
from semkv_deploy.model.config import ModelFacts

if TYPE_CHECKING:
    from semkv_deploy.export.foreign.interface import Interface

_CONFIGS = ("genai_config.json", "config.json", "generation_config.json")


def read_configs(folder: Path) -> dict[str, dict[str, Any]]:
    """The configurations that lie in a folder, by file name.

    Raises:
        SemkvError: when one is no JSON mapping, or there is none.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in _CONFIGS:
        if not (folder / name).is_file():
            continue
        try:
            config = json.loads((folder / name).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise SemkvError("not valid JSON", where=folder / name, got=error) from None
        if not isinstance(config, dict):
            raise SemkvError("not a configuration", where=folder / name, expected="a mapping")
        found[name] = config
    if not found:
        raise SemkvError(
            "no configuration of the model",
            where=folder,
            expected=" or ".join(_CONFIGS[:2]),
            fix="name the folder of configuration and tokenizer: --config-from",
        )
    return found


class Known:
    """Values of the configurations; genai's comes first, for it was written with the graph."""

    def __init__(self, configs: dict[str, dict[str, Any]], folder: Path) -> None:
        self._genai = configs.get("genai_config.json", {}).get("model") or {}
        self._decoder = self._genai.get("decoder") or {}
        self._config = configs.get("config.json", {})
        self._generation = configs.get("generation_config.json", {})
        self._folder = folder

    def integer(self, genai: str, config: str) -> int | None:
        value = self._decoder.get(
            genai, self._genai.get(genai, self._config.get(config, self._config.get(self._own(config))))
        )
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    def _own(self, name: str) -> str:
        """What the family's configuration calls a number (`n_embd` for `hidden_size`)."""
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        family = self._config.get("model_type")
        known = CONFIG_MAPPING[family].attribute_map if isinstance(family, str) and family in CONFIG_MAPPING else {}
        return str(known.get(name, name))

    def required(self, genai: str, config: str) -> int:
        value = self.integer(genai, config)
        if value is None:
            raise SemkvError(
                f"nothing says what {config} is",
                where=self._folder,
                expected=f"{config} in config.json, or {genai} in genai_config.json",
                fix="put the model's config.json beside the graph, or name its folder: --config-from",
            )
        return value

    @property
    def family(self) -> str:
        name = self._config.get("model_type") or self._genai.get("type")
        if not isinstance(name, str):
            raise SemkvError(
                "nothing says of what family the model is",
                where=self._folder,
                expected="model_type in config.json, or type in genai_config.json",
                fix="put the model's config.json beside the graph, or name its folder: --config-from",
            )
        return name

    @property
    def ends(self) -> set[int]:
        given = [source.get("eos_token_id") for source in (self._genai, self._config, self._generation)]
        listed = [token for value in given for token in (value if isinstance(value, list) else [value])]
        return {token for token in listed if isinstance(token, int)}


def head_size(roles: Interface, known: Known) -> int:
    """Values of a head: of the cache's shape where it states it, else of the configuration."""
    return roles.layers[0].head_dim or known.required("head_size", "head_dim")


def model_facts(model: ir.Model, roles: Interface, known: Known, source: str, ends: set[int]) -> ModelFacts:
    """Facts of a decoder, before it is rewritten.

    Args:
        source: base name of its folder.
        ends: tokens that end a reply, of the tokenizer.

    Raises:
        SemkvError: when layers differ, or when neither graph nor configuration says what must be known.
    """
    layers = roles.layers
    stated = [layer.query_heads or known.required("num_attention_heads", "num_attention_heads") for layer in layers]
    heads = {(count, layer.kv_heads) for count, layer in zip(stated, layers, strict=True)}
    if len(heads) > 1:
        raise SemkvError("layers differ in (query heads, KV heads)", where=source, got=sorted(heads))
    ((query_heads, kv_heads),) = heads
    size = head_size(roles, known)
    declared = known.integer("num_hidden_layers", "num_hidden_layers")
    if declared is not None and declared != len(layers):
        raise SemkvError("not every layer's attention is recognised", where=source, expected=declared, got=len(layers))
    tables = {layer.turned_by for layer in layers}
    longest = known.required("context_length", "max_position_embeddings")
    rotary = None
    if len(tables) == 1 and None not in tables:
        ((cos, sin),) = (pair for pair in tables if pair)
        rotary = rotary_of(_table(cos, source), _table(sin, source))
    elif tables == {None}:
        found = tables_in_graph(model, roles, min(longest, TABLE_ROWS))
        rotary = rotary_of(*found) if found else None
    for table in {table for pair in tables if pair for table in pair}:
        longest = min(longest, len(_table(table, source)))
    logits = roles.logits.shape
    vocabulary = logits[-1] if logits is not None else None
    try:
        return ModelFacts(
            family=known.family,
            source=source,
            layers=len(layers),
            query_heads=query_heads,
            kv_heads=kv_heads,
            head_dim=size,
            hidden_size=known.required("hidden_size", "hidden_size"),
            vocab_size=vocabulary if isinstance(vocabulary, int) else known.required("vocab_size", "vocab_size"),
            max_position=longest,
            dtype="float32",
            eos_token_ids=tuple(sorted(known.ends | ends)),
            windows=tuple(layer.window for layer in layers),
            rotary=rotary,
            versions={
                "semkv-deploy": semkv_deploy.__version__,
                "python": ".".join(map(str, sys.version_info[:2])),
                **{name: version(name) for name in ("onnx", "onnxscript")},
            },
        )
    except ValidationError as error:
        fault = error.errors()[0]
        raise SemkvError("its facts are none of a model", where=source, got=fault["msg"]) from None


def _table(value: ir.Value | None, where: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    if tensor is None:
        raise SemkvError("a rotary table that is no constant", where=where, got=None if value is None else value.name)
    return np.asarray(tensor.numpy(), np.float64)
