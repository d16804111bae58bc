"""The `semkv` operator set, version 1: for each operator a contract, a PyTorch reference and an ONNX function body.

`function_protos()` needs onnx only; `register_torch()` needs PyTorch. Neither is imported before it is needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from semkv_deploy.ops import (
    compact_cache,
    nexus_attention,
    semantic_block_map,
    semantic_block_select,
    semantic_cluster,
)
from semkv_deploy.ops.spec import DOMAIN, OPSET, VERSION, OperatorSpec, TensorSpec

if TYPE_CHECKING:
    import onnx

__all__ = ["DOMAIN", "OPSET", "SPECS", "VERSION", "OperatorSpec", "TensorSpec", "function_protos", "register_torch"]

_MODULES = (nexus_attention, semantic_cluster, semantic_block_map, semantic_block_select, compact_cache)

SPECS: dict[str, OperatorSpec] = {module.OP.name: module.OP for module in _MODULES}
"""Every operator's spec, by operator name."""


def function_protos() -> list[onnx.FunctionProto]:
    """The body of every operator, to be stored in a model as its local functions."""
    return [module.function_proto() for module in _MODULES]


def register_torch() -> None:
    """Register `torch.ops.semkv.*`; safe to call more than once."""
    for module in _MODULES:
        module.register_torch()
