"""What a stranger finds in the repository: the licence, files that texts name, hooks that run without a network."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent


def tracked() -> list[Path]:
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [path for line in done.stdout.splitlines() if (path := ROOT / line).is_file()]


def test_licence_is_the_text_of_apache_2():
    digest = hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest()
    assert digest == "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"


def test_pages_that_texts_name_are_here():
    """Every `.md` that a text or a docstring names is in the repository, from its root or beside the text."""
    names = {path.name for path in tracked()}
    for path in tracked():
        if path.suffix not in (".py", ".md", ".yaml", ".sh", ".toml", ".h", ".cu", ".cuh", ".cpp"):
            continue
        for name in re.findall(r"(?<![\w*])[\w./-]*\w\.md\b", path.read_text(encoding="utf-8")):
            if not name.startswith(("http", "//")):
                here = [(ROOT / name), (path.parent / name)]
                assert any(page.is_file() for page in here) or name in names, f"{path.relative_to(ROOT)} names {name}"


def test_paths_that_contributing_names_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = set(re.findall(r"(?:tests|scripts|semkv_deploy|cli)/[\w./-]*\w", text))
    assert len(named) > 10
    for name in named - {"semkv_deploy/cli"}:
        assert (ROOT / name).exists() or (ROOT / "semkv_deploy" / name).exists(), name


def test_hooks_are_local_and_in_the_development_extra():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    assert [repository["repo"] for repository in hooks] == ["local"]
    extra = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("dev = [")[1]
    for hook in hooks[0]["hooks"]:
        assert hook["language"] == "system" and f'"{hook["entry"].split()[0]}>=' in extra


def test_wheel_has_the_licence_and_says_that_it_is_typed(tmp_path: Path):
    import zipfile

    pytest.importorskip("setuptools", "77")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", tmp_path]
    source = tmp_path / "source"
    for path in tracked():
        if path.relative_to(ROOT).parts[0] in ("semkv_deploy", "LICENSE", "README.md", "pyproject.toml"):
            copy = source / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    subprocess.run([*command, source], check=True, capture_output=True)
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    assert "semkv_deploy/py.typed" in names and "semkv_deploy/data/calibration.txt" in names
    assert {f"semkv_deploy/data/domains/{name}.txt" for name in ("prose", "code", "chat", "cjk")} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
