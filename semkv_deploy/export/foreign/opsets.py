"""Graphs of old opsets, raised by ONNX's converter to one that the rules read.

Whether a conversion is exact is not believed: an import is run beside the file as it was.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from semkv_deploy import ops
from semkv_deploy.errors import SemkvError

if TYPE_CHECKING:
    import onnx_ir as ir

READ = 18
"""The oldest opset that rules read: reductions take their axes as inputs from here on, and no later change touches what
decoders are made of."""

CONVERTED = 13
"""The oldest that is raised to it. Before it Softmax flattened its input, and the converter writes that out."""


def raise_opset(model: ir.Model, where: str) -> None:
    """Brings a model to an opset that rules read, in place.

    Raises:
        SemkvError: when it is older or newer than what can be raised, or the converter cannot.
    """
    opset = model.graph.opset_imports.get("", 0)
    if READ <= opset <= ops.OPSET:
        return
    if not CONVERTED <= opset < READ:
        raise SemkvError("opset", where=where, expected=f"{CONVERTED} to {ops.OPSET}", got=opset)
    from onnxscript import version_converter

    # It warns that it hands the graph to onnx's own converter, which is what is wanted.
    logging.getLogger(version_converter.__name__).setLevel(logging.ERROR)
    try:
        version_converter.convert_version(model, READ, fallback=True)
    except Exception as error:
        raise _not_raised(where, opset, error) from error
    # Where the converter gives up it leaves the model as it is.
    if model.graph.opset_imports.get("", 0) != READ:
        raise _not_raised(where, opset, "onnx's converter gives up")


def _not_raised(where: str, opset: int, why: object) -> SemkvError:
    return SemkvError(
        f"of opset {opset}, which cannot be raised to {READ}",
        where=where,
        got=why,
        fix=f"export the model again with opset {READ} or newer",
    )
