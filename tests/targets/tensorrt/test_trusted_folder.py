"""Engine caches: a folder that others can write to, or put another in the place of, is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from semkv_deploy.errors import SemkvError
from semkv_deploy.targets.tensorrt import trusted_folder
from semkv_deploy.targets.tensorrt.build import TensorRTOptions, check_options
from semkv_deploy.targets.tensorrt.trusted_folder import check_private, is_own_file, make_private_folder


def test_a_folder_of_ones_own(tmp_path: Path):
    make_private_folder(tmp_path / "deep/cache", "--engine-cache")
    assert (tmp_path / "deep/cache").stat().st_mode & 0o077 == 0
    make_private_folder(tmp_path / "deep/cache", "--engine-cache")


@pytest.mark.parametrize("mode", [0o777, 0o757, 0o1777, 0o722])
def test_a_folder_that_others_write_to(mode: int, tmp_path: Path):
    """Also a sticky one: others could add entries."""
    cache = tmp_path / "cache"
    cache.mkdir()
    cache.chmod(mode)
    with pytest.raises(SemkvError, match=rf"--engine-cache {cache}: others could put engines into it.*can write to it"):
        check_options("tensorrt-rtx", TensorRTOptions(engine_cache=cache))


def test_a_folder_of_a_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cache = tmp_path / "cache"
    cache.mkdir()
    cache.chmod(0o770)
    for own in (False, True):
        monkeypatch.setattr(trusted_folder, "_is_own_group", lambda group, own=own: own)
        if own:
            check_private(cache, "--engine-cache")
            continue
        with pytest.raises(SemkvError, match="its group can write to it"):
            check_private(cache, "--engine-cache")
    monkeypatch.setattr(trusted_folder, "_has_list", lambda path: True)
    with pytest.raises(SemkvError, match="its group can write to it"):
        check_private(cache, "--engine-cache")


def test_a_folder_above_that_others_write_to(tmp_path: Path):
    cache = tmp_path / "shared/cache"
    cache.mkdir(parents=True)
    (tmp_path / "shared").chmod(0o777)
    with pytest.raises(SemkvError, match=rf"got {tmp_path / 'shared'}: everybody can write to it"):
        check_private(cache, "--engine-cache")
    (tmp_path / "shared").chmod(0o1777)
    check_private(cache, "--engine-cache")


def test_a_link_is_judged_by_what_it_leads_to(tmp_path: Path):
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o777)
    (tmp_path / "cache").symlink_to(tmp_path / "shared")
    with pytest.raises(SemkvError, match="everybody can write to it"):
        check_private(tmp_path / "cache", "--engine-cache")


def test_a_folder_of_somebody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if os.geteuid() != 0:
        pytest.skip("only root can give a folder away")
    (tmp_path / "cache").mkdir()
    os.chown(tmp_path / "cache", 12345, -1)
    with pytest.raises(SemkvError, match="it belongs to user 12345"):
        check_private(tmp_path / "cache", "--engine-cache")


def test_files_of_ones_own(tmp_path: Path):
    path = tmp_path / "a.plan"
    assert not is_own_file(path)
    path.touch()
    assert is_own_file(path)
    (tmp_path / "link").symlink_to(path)
    assert not is_own_file(tmp_path / "link")
    path.chmod(0o666)
    assert not is_own_file(path)
