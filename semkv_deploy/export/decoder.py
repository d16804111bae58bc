"""The decoder graph: per-layer caches come in and go out, attention is one `semkv::NexusAttention` a layer.

Inputs (L layers, B batch, S sequence, R rows, C capacity; every size but the layer count, heads and head size is free):
    input_ids     [B,S]  int64
    position_ids  [B,S]  int64    positions of the tokens: true counts, never cache lengths
    logits_index  [B,R]  int64    which of the S rows' logits are wanted
    length        [L,B]  int64    live slots of each layer's cache
    past_key_values.00.key, past_key_values.00.value  [B,kv_heads,C,head_dim]  and slot_bias.00  [B,kv_heads,C] float32
                                  for each layer, two digits
Outputs:
    logits        [B,R,vocabulary]
    present.00.key, present.00.value  [B,kv_heads,C,head_dim]  for each layer: the past with the S new rows appended

`ReferenceDecoder` runs this in PyTorch with the operator's reference, `export_decoder` writes it as an ONNX model.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import onnx_ir as ir
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from semkv_deploy import ops
from semkv_deploy.errors import SemkvError
from semkv_deploy.export.attention import LayerSpec, nexus_attention, probe, unsupported
from semkv_deploy.export.tidy import tidy
from semkv_deploy.model.names import STEP_INPUTS, cache_names, present_names
from semkv_deploy.ops import nexus_attention as nexus

LayerCache = tuple[Tensor, Tensor, Tensor]
"""key, value [B,kv_heads,C,head_dim] and slot_bias [B,kv_heads,C]."""

Operator = Callable[..., tuple[Tensor, Tensor, Tensor]]
"""NexusAttention's inputs, then its attributes by name -> its outputs."""


class DecoderModule(nn.Module):
    """A transformers decoder with its caches as inputs and outputs. Run it inside `nexus_attention(model)`."""

    def __init__(self, model: PreTrainedModel, operator: Operator) -> None:
        super().__init__()
        self.model = model
        self.operator = operator

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        logits_index: Tensor,
        length: Tensor,
        caches: list[LayerCache],
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        present: dict[int, tuple[Tensor, Tensor]] = {}

        def attend(layer: int, spec: LayerSpec, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            inputs = (query, key, value, *caches[layer], length[layer])
            output, key_cache, value_cache = self.operator(*inputs, **spec.attributes)
            present[layer] = (key_cache, value_cache)
            return output

        with _rows_before_head(self.model, logits_index):
            result = self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False, semkv_attend=attend)
        return result.logits, [present[layer] for layer in range(len(caches))]


@contextmanager
def _rows_before_head(model: PreTrainedModel, logits_index: Tensor) -> Iterator[None]:
    """Gather rows `logits_index` [B,R] of the hidden states before the language-model head sees them.

    A hook, not `logits_to_keep`: with an index per batch row that one fixes the batch size when traced
    (transformers 5.23), and what a family does to its logits after the head stays as it is.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise unsupported(model, "it has no language-model head")

    def gather(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, *rest = arguments
        index = logits_index.unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
        return (torch.gather(hidden, 1, index), *rest)

    handle = head.register_forward_pre_hook(gather)
    try:
        yield
    finally:
        handle.remove()


class ReferenceDecoder:
    """The decoder graph in PyTorch, attention by the operator's reference: slow, and what everything is compared to.

    The model keeps its own attention between calls. Not for several threads at once.

    Args:
        watch: called for each layer in turn with query `[B,Hq,S,D]`, keys `[B,Hkv,C,D]` after the append, length `[B]`
            before it, scale and soft cap.
    """

    def __init__(self, model: PreTrainedModel, watch: Callable[..., None] | None = None) -> None:
        ops.register_torch()
        self.model = model
        self.layers = probe(model).layers
        operator: Operator = torch.ops.semkv.nexus_attention

        def watched(*inputs: Tensor, **attributes: float) -> tuple[Tensor, Tensor, Tensor]:
            outputs = operator(*inputs, **attributes)
            if watch is not None:
                watch(inputs[0], outputs[1], inputs[6], attributes.get("scale", 0.0), attributes.get("softcap", 0.0))
            return outputs

        self._module = DecoderModule(model, watched)

    def empty_caches(self, batch: int, capacity: int, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Zeroed cache inputs by name. dtype: of keys and values, the model's when None."""
        caches: dict[str, Tensor] = {}
        for layer, spec in enumerate(self.layers):
            key, value, bias = cache_names(layer, len(self.layers))
            shape = (batch, spec.kv_heads, capacity, spec.head_dim)
            caches[key] = torch.zeros(shape, dtype=dtype or self.model.dtype)
            caches[value] = torch.zeros(shape, dtype=dtype or self.model.dtype)
            caches[bias] = torch.zeros(shape[:3])
        return caches

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The graph's inputs by name -> its outputs by name.

        Raises:
            SemkvError: naming inputs that are missing, or when the new rows do not fit a cache.
        """
        caches = [cache_names(layer, len(self.layers)) for layer in range(len(self.layers))]
        missing = [name for name in (*STEP_INPUTS, *(n for names in caches for n in names)) if name not in inputs]
        if missing:
            raise SemkvError("decoder inputs are missing", where="ReferenceDecoder", got=", ".join(missing))
        with nexus_attention(self.model), torch.no_grad():
            logits, present = self._module(
                *(inputs[name] for name in STEP_INPUTS),
                [(inputs[key], inputs[value], inputs[bias]) for key, value, bias in caches],
            )
        outputs = {"logits": logits}
        for layer, pair in enumerate(present):
            outputs.update(zip(present_names(layer, len(self.layers)), pair, strict=True))
        return outputs


def _symbolic_operator(*inputs: Tensor, **attributes: float) -> tuple[Tensor, Tensor, Tensor]:
    """The operator as a node of the graph being traced; outputs have the shapes of query and the two caches."""
    like = (inputs[0], inputs[3], inputs[4])
    output, key_cache, value_cache = torch.onnx.ops.symbolic_multi_out(
        f"{ops.DOMAIN}::{nexus.OP.name}",
        inputs,
        dict(attributes),
        dtypes=[tensor.dtype for tensor in like],
        shapes=[tensor.shape for tensor in like],
        version=ops.VERSION,
    )
    return output, key_cache, value_cache


def trace_decoder(model: PreTrainedModel) -> ir.Model:
    """The decoder graph as torch's exporter leaves it: right inputs and outputs, names and shape arithmetic as traced.

    Weights are the model's tensors, not copies.

    Raises:
        SemkvError: when the architecture is not supported.
    """
    layers = probe(model).layers
    batch, sequence, rows, capacity = 2, 3, 4, 7
    example = [
        (
            torch.zeros(batch, spec.kv_heads, capacity, spec.head_dim, dtype=model.dtype),
            torch.zeros(batch, spec.kv_heads, capacity, spec.head_dim, dtype=model.dtype),
            torch.zeros(batch, spec.kv_heads, capacity),
        )
        for spec in layers
    ]
    arguments = (
        torch.zeros(batch, sequence, dtype=torch.int64),
        torch.arange(sequence).repeat(batch, 1),
        torch.zeros(batch, rows, dtype=torch.int64),
        torch.zeros(len(layers), batch, dtype=torch.int64),
        example,
    )
    b, s, r, c = (torch.export.Dim(name) for name in ("batch", "sequence", "rows", "capacity"))
    shapes = ({0: b, 1: s}, {0: b, 1: s}, {0: b, 1: r}, {1: b}, [({0: b, 2: c},) * 3] * len(layers))
    module = DecoderModule(model, _symbolic_operator)
    with nexus_attention(model), torch.no_grad(), _quiet_exporter():
        try:
            program = torch.export.export(module, arguments, dynamic_shapes=shapes, strict=False)
            result = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=ops.OPSET,
                input_names=[*STEP_INPUTS, *(name for i in range(len(layers)) for name in cache_names(i, len(layers)))],
                output_names=["logits", *(name for i in range(len(layers)) for name in present_names(i, len(layers)))],
                optimize=False,
                verbose=False,
            )
        except SemkvError:
            raise
        except Exception as error:
            raise unsupported(model, f"it cannot be traced: {_root_cause(error)}") from error
    assert result is not None
    return result.model


def _root_cause(error: BaseException) -> str:
    """First line of the innermost error; the exporter wraps the one that says something."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def export_decoder(model: PreTrainedModel) -> ir.Model:
    """The portable decoder graph, ready to be written. Weights are the model's tensors, not copies.

    Raises:
        SemkvError: when the architecture is not supported.
    """
    graph = trace_decoder(model)
    layers = model.config.get_text_config().num_hidden_layers
    dims = {
        ("input_ids", 0): "batch",
        ("input_ids", 1): "sequence",
        ("logits_index", 1): "rows",
        (cache_names(0, layers)[0], 2): "capacity",
    }
    tidy(graph, dims, layers)
    return graph


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence the exporter about packages (torchvision) and deprecations that have nothing to do with the model."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        logger.setLevel(level)
