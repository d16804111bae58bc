"""What TensorRT would refuse, ignore or do slowly: every rule, each measured on TensorRT-RTX 1.7.1.

The rules are in the files beside this one, a small function each; its docstring quotes the importer or the builder.
`tests/lint/test_tensorrt_rules.py` compares every rule with the builder and prints how often they agree. Nothing was
run on a GPU: `wrong` means that the construct is absent from what was built, not that answers were compared.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import onnx

from semkv_deploy.lint.onnxruntime import Finding
from semkv_deploy.lint.tensorrt import attention, cache, files, operators, own_operators
from semkv_deploy.lint.tensorrt.view import Rule, View

RULES: list[Rule] = [*cache.RULES, *attention.RULES, *own_operators.RULES, *operators.RULES, *files.RULES]


def lint_tensorrt(
    model: onnx.ModelProto, *, folder: Path | None = None, plugins: Collection[str] = (), profiles: bool = False
) -> list[Finding]:
    """Findings for `tensorrt*` in any ONNX model.

    Args:
        model: external data need not be loaded.
        folder: where its external data lies; None: files are not looked at.
        plugins: operators whose plugins will be registered.
        profiles: the dynamic inputs have optimization profiles.
    """
    view = View(model, folder, plugins)
    rules = [rule for rule in RULES if not (profiles and rule is files.dynamic_input)]
    return [replace(finding, rule=rule.__name__) for rule in rules for finding in rule(view)]
