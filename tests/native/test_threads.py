"""The CPUs that this process may use: its affinity and the quotas of its control groups."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from semkv_deploy.targets.onnxruntime.threads import usable_cpus


@pytest.fixture(autouse=True)
def four_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 4, 5}, raising=False)


def groups(folder: Path, own: str, **files: str) -> tuple[Path, Path]:
    """A mounted hierarchy with some files, and the file that names the process's groups."""
    for name, text in files.items():
        path = folder / "cgroup" / name.replace("__", "/").replace("_max", ".max").replace("_cfs_", ".cfs_")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (folder / "own").write_text(own)
    return folder / "cgroup", folder / "own"


def test_without_a_quota_it_is_the_affinity(tmp_path: Path) -> None:
    assert usable_cpus(tmp_path / "none", tmp_path / "nowhere") == 4
    assert usable_cpus(*groups(tmp_path, "0::/app\n", app__cpu_max="max 100000\n")) == 4


@pytest.mark.parametrize(("quota", "cpus"), [("200000 100000", 2), ("150000 100000", 2), ("50000 100000", 1)])
def test_a_quota_is_rounded_up(tmp_path: Path, quota: str, cpus: int) -> None:
    assert usable_cpus(*groups(tmp_path, "0::/app\n", app__cpu_max=quota)) == cpus


def test_a_group_above_limits_those_below(tmp_path: Path) -> None:
    found = groups(tmp_path, "0::/pod/app\n", pod__app__cpu_max="max 100000", pod__cpu_max="300000 100000")
    assert usable_cpus(*found) == 3


def test_inside_a_container_the_root_is_its_own(tmp_path: Path) -> None:
    assert usable_cpus(*groups(tmp_path, "0::/not/here\n", cpu_max="100000 100000")) == 1


def test_the_first_version_of_control_groups(tmp_path: Path) -> None:
    folder, own = groups(tmp_path, "4:cpu,cpuacct:/app\n3:memory:/app\n")
    inside = folder / "cpu,cpuacct" / "app"
    inside.mkdir(parents=True)
    (inside / "cpu.cfs_quota_us").write_text("250000\n")
    (inside / "cpu.cfs_period_us").write_text("100000\n")
    assert usable_cpus(folder, own) == 3
    (inside / "cpu.cfs_quota_us").write_text("-1\n")
    assert usable_cpus(folder, own) == 4


def test_a_machine_without_affinity(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert usable_cpus(tmp_path, tmp_path / "own") == 3
