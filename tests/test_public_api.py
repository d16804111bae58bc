"""The names of `semkv_deploy` are there, are what they say, and cost nothing until they are used."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import semkv_deploy


def test_every_name_is_there_and_is_listed():
    for name in semkv_deploy.__all__:
        assert getattr(semkv_deploy, name) is not None and name in dir(semkv_deploy)
    with pytest.raises(AttributeError, match="has no attribute 'compile'"):
        _ = semkv_deploy.compile


def test_names_are_what_they_say():
    from semkv_deploy.bundle import Bundle
    from semkv_deploy.compiler.pipeline import build_bundle
    from semkv_deploy.errors import SemkvError
    from semkv_deploy.export import export_model
    from semkv_deploy.methods import Method, register
    from semkv_deploy.runtime.open import open_bundle, open_session
    from semkv_deploy.runtime.session import Session
    from semkv_deploy.runtime.tokens import load_tokenizer
    from semkv_deploy.validate.run import validate

    assert (semkv_deploy.Bundle, semkv_deploy.Session, semkv_deploy.Method) == (Bundle, Session, Method)
    assert (semkv_deploy.open_bundle, semkv_deploy.open_session) == (open_bundle, open_session)
    assert (semkv_deploy.export_model, semkv_deploy.build_bundle) == (export_model, build_bundle)
    assert semkv_deploy.validate_bundle is validate and semkv_deploy.load_tokenizer is load_tokenizer
    assert semkv_deploy.SemkvError is SemkvError and semkv_deploy.register is register


def test_types_are_those_of_the_names():
    """What a type checker imports is what `__getattr__` gives."""
    source = Path(semkv_deploy.__file__).read_text(encoding="utf-8")
    (block,) = (
        node.body
        for node in ast.parse(source).body
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    )
    typed = {
        alias.asname or alias.name: (str(node.module).removeprefix("semkv_deploy."), alias.name)
        for node in block
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed == semkv_deploy._FROM
    assert set(typed) | {"__version__"} == set(semkv_deploy.__all__)


def test_packages_keep_their_names():
    """No public name hides a package: `export` and `validate` are imported from as packages."""
    code = (
        "import semkv_deploy\n"
        "semkv_deploy.export_model, semkv_deploy.validate_bundle\n"
        "from semkv_deploy.export.attention import probe\n"
        "from semkv_deploy.validate.run import validate\n"
        "import types\n"
        "assert isinstance(semkv_deploy.export, types.ModuleType)\n"
        "assert isinstance(semkv_deploy.validate, types.ModuleType)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_imports_nothing_else():
    code = (
        "import sys, semkv_deploy\n"
        "names = {name.split('.')[0] for name in sys.modules}\n"
        "assert not names & {'numpy', 'onnx', 'torch', 'pydantic', 'transformers', 'click'}, names\n"
        "assert [name for name in sys.modules if name.startswith('semkv_deploy.')] == []\n"
        "assert semkv_deploy.__version__ and semkv_deploy.SemkvError\n"
        "assert 'numpy' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_paths_may_be_text(tiny_bundle: Path):
    bundle = semkv_deploy.open_bundle(str(tiny_bundle))
    assert bundle.root == tiny_bundle and semkv_deploy.load_tokenizer(str(tiny_bundle)) is not None
    assert semkv_deploy.open_session(bundle, budget="128tokens").contract.budget == 0.25
