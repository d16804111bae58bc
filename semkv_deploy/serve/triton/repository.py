"""Writes a model repository for Triton: config.pbtxt, model.py, and the bundle."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from semkv_deploy import __version__
from semkv_deploy.bundle import MANIFEST, Bundle, new_directory
from semkv_deploy.bundle.own import foreign as foreign_of_bundle
from semkv_deploy.choices import TritonBackend
from semkv_deploy.errors import SemkvError
from semkv_deploy.serve.triton.inputs import INPUTS, OUTPUTS, Tensor

if TYPE_CHECKING:
    from semkv_deploy.budget_units import BudgetLike
    from semkv_deploy.serve.options import ServingOptions

CONFIG, VERSION, MODEL, BUNDLE = "config.pbtxt", "1", "model.py", "bundle"

BACKENDS: dict[TritonBackend, str] = {"python": "python", "cpp": "semkv"}
"""Triton's names of the backends that run a model: its own for Python, and libtriton_semkv.so of `plugins/runtime`."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")

_MODEL = f'''"""Serves the bundle beside this file. Written by semkv-deploy {__version__}, and needs it installed."""

import os
import sys

# Some builds of Triton's Python backend start Python without a look at PYTHONPATH.
sys.path[:0] = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path not in sys.path]

from semkv_deploy.serve.triton.model import TritonPythonModel  # noqa: E402

__all__ = ["TritonPythonModel"]
'''

Progress = Callable[[str, "float | None"], None]


def write_repository(
    bundle: Path,
    out: Path,
    name: str,
    options: ServingOptions,
    *,
    budget: BudgetLike | None = None,
    target: str = "onnxruntime-cpu",
    allow_plugins: bool = False,
    backend: TritonBackend = "python",
    force: bool = False,
    progress: Progress = lambda what, share: None,
) -> Path:
    """Writes a model to a repository, beside others that are there; returns its directory.

    Args:
        bundle: is verified, and copied.
        out: the repository.
        name: of the model.
        budget: None: the smallest built.
        allow_plugins: let native code of plugins in the bundle's engines run.
        backend: "cpp" takes texts where onnxruntime-genai's library and a tokenizer that it reads are there.
        force: replace a model of that name that this tool wrote.

    Raises:
        SemkvError: for a name that Triton does not take, a bundle that is not whole or has no such budget or target, or
            a model that is there.
    """
    if not _NAME.fullmatch(name):
        expected = "letters, digits, _, - and ., with no - or . first"
        raise SemkvError("not a name for a model", where="--name", expected=expected, got=repr(name))
    progress("verify", None)
    opened = Bundle.open(bundle, allow_plugins=allow_plugins)
    share = opened.built(target, budget).contract.budget
    with new_directory(out / name, force=force, foreign=_foreign, sources=[bundle]) as root:
        (root / VERSION).mkdir()
        text = config(name, share, target, options, allow_plugins=allow_plugins, backend=backend)
        (root / CONFIG).write_text(text, encoding="utf-8")
        if backend == "python":
            (root / VERSION / MODEL).write_text(_MODEL, encoding="utf-8")
        names = [MANIFEST, *sorted(opened.manifest.files)]
        for number, file in enumerate(names):
            progress("copy", number / len(names))
            copy = root / VERSION / BUNDLE / file
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle / file, copy)
        progress("verify the copy", None)
        Bundle.open(root / VERSION / BUNDLE, allow_plugins=allow_plugins)
    return out / name


def config(
    name: str,
    budget: float,
    target: str,
    options: ServingOptions,
    *,
    allow_plugins: bool,
    backend: TritonBackend = "python",
) -> str:
    """The text of config.pbtxt."""
    given = {name: value for name, value in options.model_dump().items() if value is not None}
    if options.save_sessions is not None:
        given["save_sessions"] = options.save_sessions.resolve()
    parameters = {"budget": repr(budget), "target": target, **given}
    if allow_plugins:
        parameters["allow_plugins"] = "true"
    lines = [
        f"# Written by semkv-deploy {__version__}. Parameters are those of `semkv-deploy triton`.",
        f"name: {_quoted(name)}",
        f"backend: {_quoted(BACKENDS[backend])}",
        "max_batch_size: 0",
        "model_transaction_policy { decoupled: true }",
        "# Sessions are one instance's: a second one would have others.",
        "instance_group [ { count: 1, kind: KIND_CPU } ]",
        _tensors("input", INPUTS, " optional: true,"),
        _tensors("output", OUTPUTS, ""),
    ]
    lines += [
        f"parameters {{ key: {_quoted(key)}, value {{ string_value: {_quoted(value)} }} }}"
        for key, value in parameters.items()
    ]
    return "\n".join(lines) + "\n"


def _tensors(kind: str, tensors: tuple[Tensor, ...], more: str) -> str:
    entries = [
        f"  # {each.says}\n  {{ name: {_quoted(each.name)}, data_type: TYPE_{each.type},{more} dims: [ {each.size} ] }}"
        for each in tensors
    ]
    return f"{kind} [\n" + ",\n".join(entries) + "\n]"


def _quoted(value: object) -> str:
    # JSON's escapes are protobuf's, as long as letters stay letters.
    return json.dumps(str(value), ensure_ascii=False)


def _foreign(root: Path) -> str | None:
    """The first thing in a model's directory that this tool did not write; None: it wrote all of it."""
    try:
        if not (root / CONFIG).read_text(encoding="utf-8").startswith("# Written by semkv-deploy "):
            return CONFIG
    except (OSError, UnicodeDecodeError):
        return CONFIG
    # Python leaves its own folder beside a model that was run.
    for folder, known in ((root, {CONFIG, VERSION}), (root / VERSION, {MODEL, BUNDLE, "__pycache__"})):
        for path in sorted(folder.iterdir()):
            if path.name not in known or path.is_symlink():
                return path.relative_to(root).as_posix()
    within = foreign_of_bundle(root / VERSION / BUNDLE)
    return None if within is None else f"{VERSION}/{BUNDLE}/{within}"
