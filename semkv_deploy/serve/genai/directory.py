"""Writes a model directory for onnxruntime-genai: the graph and its weights, genai_config.json, the tokenizer."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from semkv_deploy.bundle import Bundle, new_directory
from semkv_deploy.bundle.graphs import load_graph
from semkv_deploy.bundle.own import entries
from semkv_deploy.errors import SemkvError
from semkv_deploy.methods.layout import DECODE
from semkv_deploy.model.exported import TOKENIZER, is_tokenizer_file
from semkv_deploy.model.names import INPUT_IDS, LOGITS, POSITION_IDS
from semkv_deploy.model.tokenizer import read_tokenizer
from semkv_deploy.serve.genai.graph import BUILD_FULL, MASK, PAST, PRESENT, to_genai

if TYPE_CHECKING:
    from semkv_deploy.bundle.contract import Contract, GraphContract

CONFIG, GRAPH = "genai_config.json", "decoder.onnx"
TARGET = "onnxruntime-cpu"

WRITER = "semkv-deploy"
"""The sessions' name in ONNX Runtime's log, by which a directory of ours is known."""


def write_genai(
    bundle: Path,
    out: Path,
    *,
    force: bool = False,
    progress: Callable[[str, float | None], None] = lambda what, share: None,
) -> int:
    """Writes what `onnxruntime_genai.Model(out)` opens, a bundle's decoder with its full cache; returns weight bytes.

    Args:
        bundle: is verified.
        force: replace a directory that this wrote.

    Raises:
        SemkvError: for a bundle that is not whole, and one whose cache onnxruntime-genai cannot keep: without budget 1
            of `onnxruntime-cpu`, with native operators, with other groups than a layer's, with slots that are chosen.
    """
    import onnx
    import onnx_ir as ir

    progress("verify", None)
    opened = Bundle.open(bundle)
    contract, decoder = _full_cache(opened)
    with new_directory(out, force=force, foreign=foreign, sources=[bundle]) as root:
        loaded = load_graph(opened.files, decoder.onnx)
        model = ir.from_proto(onnx.load_model_from_string(loaded.model))
        fixed = {each.name: int(each.shape) for each in contract.cache.step_inputs if each.shape.isdecimal()}
        model = to_genai(model, len(contract.cache.groups), fixed)
        progress("write", None)
        (root / GRAPH).write_bytes(ir.to_proto(model).SerializeToString(deterministic=True))
        for name, data in loaded.data.items():
            # Bytes that were verified, and not the file, which may have been replaced since.
            (root / name).write_bytes(data)
        tokenizer = [name for name in opened.manifest.files if name.startswith(f"{TOKENIZER}/")]
        for name in tokenizer:
            path = root / name.removeprefix(f"{TOKENIZER}/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(opened.read(name))
        start = read_tokenizer(root).bos_token_id
        config = genai_config(contract, opened.manifest.model.hidden_size, start)
        (root / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return sum(len(data) for data in loaded.data.values())


def _full_cache(bundle: Bundle) -> tuple[Contract, GraphContract]:
    """The budget in which nothing is compressed, and its decoder.

    Raises:
        SemkvError: saying why onnxruntime-genai cannot keep its cache.
    """

    def refused(what: str, expected: str, got: object, fix: str = BUILD_FULL) -> SemkvError:
        return SemkvError(what, where=bundle.root, expected=expected, got=got, fix=fix)

    record = bundle.manifest.targets.get(TARGET)
    if record is None:
        built = ", ".join(bundle.manifest.targets)
        raise refused("onnxruntime-genai runs graphs of ONNX Runtime", f"a bundle for {TARGET}", f"one for {built}")
    contract = max((each.contract for each in record.budgets), key=lambda contract: contract.budget)
    if contract.budget != 1:
        got = ", ".join(f"{each.contract.budget:g}" for each in record.budgets)
        raise refused("onnxruntime-genai compresses no cache", "budget 1 among those built", got)
    if contract.behaviours:
        kinds = ", ".join(sorted({behaviour.kind for behaviour in contract.behaviours}))
        raise refused(f"onnxruntime-genai does not do what {bundle.manifest.method.kind} asks of a host", "none", kinds)
    if contract.native is not None:
        library = f"those of libsemkv_onnxruntime, version {contract.native}"
        raise refused("the decoder has native operators", "operators of ONNX Runtime", library)
    if len(contract.cache.groups) != contract.layers:
        got = f"{len(contract.cache.groups)} groups in {contract.layers} layers"
        fix = "build it again with: --cache-groups layer --budget 1 --native off"
        raise refused("onnxruntime-genai has one cache for each layer", "one cache group a layer", got, fix)
    return contract, contract.programs[DECODE].graphs[0]


def genai_config(contract: Contract, hidden_size: int, start: int | None) -> dict[str, Any]:
    """What genai_config.json says: names, sizes, and greedy search unless its user asks for another.

    Args:
        start: token that begins a text; None: of the tokenizer's making there is none, and genai is told the first
            that ends one, as its own builder does.
    """
    ends = list(contract.stop_ids)
    names = (PAST.format("key"), PAST.format("value"), PRESENT.format("key"), PRESENT.format("value"))
    past_key, past_value, present_key, present_value = names
    decoder = {
        "session_options": {"log_id": WRITER, "provider_options": []},
        "filename": GRAPH,
        "head_size": contract.head_dim,
        "hidden_size": hidden_size,
        "inputs": {
            "input_ids": INPUT_IDS,
            "attention_mask": MASK,
            "position_ids": POSITION_IDS,
            "past_key_names": past_key,
            "past_value_names": past_value,
        },
        "outputs": {"logits": LOGITS, "present_key_names": present_key, "present_value_names": present_value},
        "num_attention_heads": contract.query_heads,
        "num_hidden_layers": contract.layers,
        "num_key_value_heads": contract.kv_heads,
    }
    return {
        "model": {
            # One of genai's own names: a decoder about whose family it assumes nothing.
            "type": "decoder",
            "bos_token_id": ends[0] if start is None else start,
            "eos_token_id": ends,
            "pad_token_id": ends[0],
            "vocab_size": contract.vocab_size,
            "context_length": contract.max_context,
            "decoder": decoder,
        },
        "search": {"do_sample": False, "max_length": contract.max_context, "past_present_share_buffer": True},
    }


def foreign(root: Path) -> str | None:
    """The first thing in a directory that `write_genai` did not write; None: it wrote all of it."""
    try:
        options = json.loads((root / CONFIG).read_bytes())["model"]["decoder"]["session_options"]
        ours = options["log_id"] == WRITER
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        ours = False
    if not ours:
        return CONFIG
    for name, status in entries(root):
        known = name in (CONFIG, GRAPH, f"{GRAPH}.data") or is_tokenizer_file(name)
        if not known or not stat.S_ISREG(status.st_mode):
            return name
    return None
