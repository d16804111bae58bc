"""What a memory plan needs of a model, read without its weights: from an export's graph, or from a config.json."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from semkv_deploy.errors import SemkvError

if TYPE_CHECKING:
    import onnx

    from semkv_deploy.model.config import ModelFacts

Use = Literal["product", "gemm", "table", "other"]
"""What a weight is to its reader: factor of a MatMul; of a Gemm; gathered from (an embedding, also when it is the tied
head); anything else (norms, biases)."""


class Weight(NamedTuple):
    """A float tensor of the model.

    Attributes:
        shape: as the graph has it; of a product `[in, out]`.
        in_layer: whether it belongs to a decoder layer, where it meets every row of a run (the head does not).
        wide: stays in float32 whatever the dtype of the target (norms, rotary frequencies).
    """

    shape: tuple[int, ...]
    use: Use
    in_layer: bool
    wide: bool

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class DecoderShape:
    """A decoder as a plan sees it.

    Attributes:
        source: base name of the checkpoint.
        mlp_width: outputs of a layer's MLP products but the last, plus the inputs of the last (3 I of a gated MLP).
        cache_dtype: element type of the exported caches.
        rotated_alike: one rotary table for all layers, so that keys can be un-rotated before they are merged.
    """

    source: str
    family: str
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    max_position: int
    cache_dtype: str
    rotated_alike: bool
    mlp_width: int
    weights: tuple[Weight, ...]


def read_shape(source: str) -> DecoderShape:
    """The shape of `source` (`decoder.onnx` of an export, or a directory with config.json).

    Raises:
        SemkvError: when it is neither, or damaged, or a decoder that cannot be exported.
    """
    path = Path(source)
    if path.suffix == ".onnx":
        from semkv_deploy.model.config import ModelFacts
        from semkv_deploy.model.exported import load_portable

        graph = load_portable(path).graph
        return shape_of_export(graph, ModelFacts.read(path.parent / "model.json"))
    if (path / "config.json").is_file():
        return _shape_of_config(path)
    raise SemkvError(
        "cannot be planned without loading weights" if path.exists() else "no such file",
        where=source,
        expected="decoder.onnx of an export, or a directory with config.json",
        fix="export it first: semkv-deploy export <checkpoint> -o <dir>",
    )


def shape_of_export(graph: onnx.GraphProto, facts: ModelFacts) -> DecoderShape:
    """From a portable decoder graph, whose weights may be absent, and its facts."""
    import onnx

    readers: dict[str, list[tuple[str, int]]] = {}
    for node in graph.node:
        for index, name in enumerate(node.input):
            readers.setdefault(name, []).append((node.op_type, index))
    weights = []
    for tensor in graph.initializer:
        if tensor.data_type not in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16):
            continue
        read_by = readers.get(tensor.name, [])
        kinds = {kind for kind, _ in read_by}
        use: Use = "other"
        if "Gather" in kinds:
            use = "table"
        elif read_by == [("MatMul", 1)] and len(tensor.dims) == 2:
            use = "product"
        elif "Gemm" in kinds and len(tensor.dims) == 2:
            use = "gemm"
        wide = use == "other" and not kinds <= {"Add", "Gemm"}
        weights.append(Weight(tuple(tensor.dims), use, tensor.name.startswith("layers."), wide))
    return _shape(
        source=facts.source,
        family=facts.family,
        layers=facts.layers,
        query_heads=facts.query_heads,
        kv_heads=facts.kv_heads,
        head_dim=facts.head_dim,
        hidden_size=facts.hidden_size,
        vocab_size=facts.vocab_size,
        max_position=facts.max_position,
        cache_dtype=facts.dtype,
        rotated_alike=facts.rotary is not None,
        weights=tuple(weights),
    )


def _shape_of_config(folder: Path) -> DecoderShape:
    """From the modules transformers makes of a config.json, on its meta device, where tensors have no data."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from semkv_deploy.model.config import check_sizes, named_sizes
    from semkv_deploy.model.tokenizer import LOCAL, NO_CODE, no_hub

    try:
        with no_hub(), torch.device("meta"):
            config = AutoConfig.from_pretrained(str(folder), **LOCAL)
            check_sizes(named_sizes(config), folder / "config.json")
            model = AutoModelForCausalLM.from_config(config, **NO_CODE)
    except SemkvError:
        raise
    except Exception as error:  # transformers' own checks raise whatever they like
        raise SemkvError(
            f"transformers makes no decoder of it: {' '.join(str(error).split())[:300]}",
            where=folder / "config.json",
            fix="give a checkpoint of a causal language model",
        ) from None
    text = config.get_text_config()
    tied = bool(getattr(text, "tie_word_embeddings", False))
    weights = []
    for name, module in model.named_modules():
        for part, parameter in module.named_parameters(recurse=False):
            shape, in_layer = tuple(parameter.shape), ".layers." in f".{name}."
            if isinstance(module, torch.nn.Linear) and part == "weight":
                if not in_layer and tied:
                    continue  # the embedding's own tensor
                weights.append(Weight(shape[::-1], "product", in_layer, wide=False))
            elif isinstance(module, torch.nn.Embedding):
                weights.append(Weight(shape, "table", in_layer, wide=False))
            else:
                weights.append(Weight(shape, "other", in_layer, wide=part != "bias"))
    heads = text.num_attention_heads
    return _shape(
        source=folder.resolve().name,
        family=text.model_type,
        layers=text.num_hidden_layers,
        query_heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        hidden_size=text.hidden_size,
        vocab_size=text.vocab_size,
        max_position=_longest(text),
        cache_dtype="float32",
        rotated_alike=True,
        weights=tuple(weights),
    )


def _longest(config: Any) -> int:
    """As `export.facts` reads it."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        return int(rope["original_max_position_embeddings"])
    return int(config.max_position_embeddings)


def _shape(*, weights: tuple[Weight, ...], **known: Any) -> DecoderShape:
    """Adds the MLP's width: products of a layer have `hidden` rows or columns, so their elements say what is left when
    the attention's are taken out."""
    products = sum(weight.size for weight in weights if weight.in_layer and weight.use in ("product", "gemm"))
    attention = 2 * (known["query_heads"] + known["kv_heads"]) * known["head_dim"]
    width = products // (known["layers"] * known["hidden_size"]) - attention
    return DecoderShape(weights=weights, mlp_width=max(width, 0), **known)
