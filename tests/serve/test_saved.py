"""Sessions that lose their row and come back, in the same server or a later one."""

from __future__ import annotations

import shutil
import stat
from pathlib import Path
from typing import Any

import pytest

from semkv_deploy.errors import SemkvError
from semkv_deploy.model.template import Message
from semkv_deploy.runtime.open import open_session
from semkv_deploy.serve.scheduler import Scheduler
from semkv_deploy.serve.turn import Request, Unavailable

from .schedulers import Heard, Parts, alone, prompt, run, scheduler

FILES = "*.safetensors"


def saving(parts: Parts, folder: Path, **options: Any) -> Scheduler:
    return scheduler(parts, batch=1, on_full="save", folder=folder, **options)


def ask(server: Scheduler, name: str, ids: list[int]) -> Heard:
    heard = Heard()
    server.submit(name, Request(ids=ids, max_new_tokens=6), heard)
    run(server)
    return heard


def test_sessions_share_a_row_and_are_what_they_are_alone(parts: Parts, tmp_path: Path):
    server = saving(parts, tmp_path / "saved")
    turns = {name: [prompt(ord(name) + t, 60) for t in range(3)] for name in "ab"}
    heard: dict[str, list[Heard]] = {"a": [], "b": []}
    for turn in range(3):
        for name in turns:
            heard[name].append(ask(server, name, turns[name][turn]))
    for name, prompts in turns.items():
        assert [each.ids for each in heard[name]] == alone(parts, prompts, 6)
    (file,) = (tmp_path / "saved").glob(FILES)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and stat.S_IMODE(file.parent.stat().st_mode) == 0o700


def test_a_later_server_goes_on(parts: Parts, tmp_path: Path):
    """Each turn by a server of its own; the last session but one is saved when its server closes."""
    turns = [prompt(t, 60) for t in range(3)]
    replies = []
    for ids in turns:
        server = saving(parts, tmp_path)
        replies.append(ask(server, "a", ids).ids)
        server.close()
        with pytest.raises(Unavailable, match="the server is ending"):
            server.submit("a", Request(ids=[5]), Heard())
    assert replies == alone(parts, turns, 6)


def test_a_later_server_knows_conversations_by_their_messages(parts: Parts, tmp_path: Path):
    messages: list[Message] = [{"role": "user", "content": "Hello"}]
    for cached in (False, True):
        server, heard = saving(parts, tmp_path), Heard()
        server.submit(None, Request(messages=messages, max_new_tokens=6), heard)
        run(server)
        server.close()
        assert heard.end and (heard.end.cached_tokens > 0) == cached
        messages += [{"role": "assistant", "content": heard.text}, {"role": "user", "content": "Go on"}]


def test_what_cannot_be_saved_keeps_its_row(parts: Parts, tmp_path: Path):
    """The folder is gone for a while: nobody is lost, the one who wants a row is told why there is none."""
    folder, turns = tmp_path / "saved", [prompt(1, 60), prompt(2, 60)]
    now = [0.0]
    server = saving(parts, folder, clock=lambda: now[0], idle_seconds=10.0)
    first = ask(server, "a", turns[0])
    shutil.rmtree(folder)
    refused = ask(server, "b", [5, 6])
    assert refused.end and isinstance(refused.end.error, Unavailable)
    assert "no idle session can be saved" in refused.error and "No such file or directory" in refused.error
    now[0] = 11.0
    server.advance()
    assert server.held().rows_used == 1 and server.statistics.not_saved == 2 and server.statistics.evicted == 0
    folder.mkdir()
    assert ask(server, "b", [5, 6]).end is not None and server.statistics.evicted == 1
    assert [first.ids, ask(server, "a", turns[1]).ids] == alone(parts, turns, 6)


def test_a_damaged_session_is_gone_and_begins_anew(parts: Parts, tmp_path: Path):
    server = saving(parts, tmp_path)
    ask(server, "a", prompt(1, 60))
    ask(server, "b", prompt(2, 60))
    (file,) = tmp_path.glob(FILES)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert "the session is gone" in (damaged := ask(server, "a", [5, 6])).error and "damaged" in damaged.error
    assert not file.exists()
    assert ask(server, "a", [5, 6]).ids == alone(parts, [[5, 6]], 6)[0]


def test_a_session_that_ends_leaves_no_file(parts: Parts, tmp_path: Path):
    server = saving(parts, tmp_path)
    for name in "ab":
        ask(server, name, [5, 6])
    server.end_session("a")
    run(server)
    assert list(tmp_path.glob(FILES)) == [] and server.held().sessions == 1


def test_the_oldest_goes_where_there_are_as_many_as_there_may_be(parts: Parts, tmp_path: Path):
    server = saving(parts, tmp_path, max_sessions=2)
    for name in "abc":
        ask(server, name, [5, 6])
    assert server.held().sessions == 2 and len(list(tmp_path.glob(FILES))) == 1
    assert (again := ask(server, "b", [5, 6]).end) and again.cached_tokens > 0


def test_a_folder_of_others(parts: Parts, tmp_path: Path):
    open_session(parts.bundle, budget=0.5, threads=1).save(tmp_path / "mine.safetensors")
    with pytest.raises(SemkvError, match="of another budget"):
        saving(parts, tmp_path)
    open_session(parts.bundle, budget=0.25, threads=1).save(tmp_path / "mine.safetensors")
    with pytest.raises(SemkvError, match=r"not a server's session.*Give sessions a folder of their own"):
        saving(parts, tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(SemkvError, match="cannot be made: File exists"):
        saving(parts, tmp_path / "file")
    with pytest.raises(SemkvError, match="a folder is given for saved sessions, and only for them"):
        scheduler(parts, on_full="save")


def test_a_folder_is_one_servers_at_a_time(parts: Parts, tmp_path: Path):
    first = saving(parts, tmp_path)
    with pytest.raises(SemkvError, match=r"another server has its sessions there.*--share-sessions"):
        saving(parts, tmp_path)
    first.close()
    saving(parts, tmp_path).close()
