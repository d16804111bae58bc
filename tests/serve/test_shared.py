"""Servers that share a folder of sessions: each goes on with any, and one that dies takes nothing that was answered."""

from __future__ import annotations

import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from semkv_deploy.errors import SemkvError
from semkv_deploy.model.template import Message
from semkv_deploy.runtime.open import open_session
from semkv_deploy.serve.scheduler import Scheduler
from semkv_deploy.serve.turn import Request, Unavailable, UnknownSession

from .schedulers import Heard, Parts, alone, prompt, run, scheduler

FILES = "*.safetensors"


def sharing(parts: Parts, folder: Path, batch: int = 1, **options: Any) -> Scheduler:
    return scheduler(parts, batch=batch, folder=folder, share_folder=True, **options)


def ask(server: Scheduler, name: str | None, ids: list[int] | None = None, **request: Any) -> Heard:
    heard = Heard()
    server.submit(name, Request(ids=ids or [], max_new_tokens=6, **request), heard)
    run(server)
    return heard


def test_turns_of_a_session_go_to_any_server(parts: Parts, tmp_path: Path):
    """Rows are evicted, found out of date, and right: two servers of one row each, two sessions."""
    servers = [sharing(parts, tmp_path) for _ in range(2)]
    turns = {name: [prompt(ord(name) + t, 60) for t in range(4)] for name in "ab"}
    for name, order in (("a", [0, 0, 1, 0]), ("b", [1, 0, 0, 1])):
        replies = [ask(servers[at], name, ids).ids for at, ids in zip(order, turns[name], strict=True)]
        assert replies == alone(parts, turns[name], 6)
    assert len(list(tmp_path.glob(FILES))) == 2
    for server in servers:
        server.close()
    assert not list(tmp_path.glob("*.lock")) and not list(tmp_path.glob("*.partial"))


def test_who_had_the_last_turn_reads_nothing(parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    one, other = sharing(parts, tmp_path), sharing(parts, tmp_path)
    loads: list[Path] = []
    for server in (one, other):
        read = server.session.load
        monkeypatch.setattr(server.session, "load", lambda path, row, read=read: (loads.append(path), read(path, row)))
    ask(one, "a", [5, 6])
    ask(one, "a", [7, 8])
    assert len(loads) == 0
    ask(other, "a", [5, 6])
    ask(one, "a", [5, 6])
    assert len(loads) == 2


def test_a_conversation_is_known_to_all_by_its_messages(parts: Parts, tmp_path: Path):
    servers = [sharing(parts, tmp_path) for _ in range(2)]
    messages: list[Message] = [{"role": "user", "content": "Hello"}]
    for turn, at in enumerate([0, 1, 1, 0]):
        heard = ask(servers[at], None, messages=messages)
        assert heard.end and (heard.end.cached_tokens > 0) == (turn > 0)
        assert len(list(tmp_path.glob("*.messages"))) == 1
        messages += [{"role": "assistant", "content": heard.text}, {"role": "user", "content": "Go on"}]
    # Another end of it is another conversation, and the first can still be gone on with.
    other = ask(servers[1], None, messages=[*messages[:2], {"role": "user", "content": "Stop"}])
    assert other.end and other.end.cached_tokens == 0
    assert (again := ask(servers[1], None, messages=messages).end) and again.cached_tokens > 0


DIES = """
import sys
from pathlib import Path
from semkv_deploy.runtime.open import open_bundle, open_session
from semkv_deploy.runtime.tokens import load_tokenizer
from semkv_deploy.serve.scheduler import Scheduler
from semkv_deploy.serve.turn import Request

session = open_session(open_bundle(sys.argv[1]), budget=0.25, threads=1)
server = Scheduler(session, load_tokenizer(sys.argv[1]), folder=Path(sys.argv[2]), share_folder=True)
first, second = ([int(token) for token in ids.split()] for ids in sys.argv[3:])
server.submit("a", Request(ids=first, max_new_tokens=6), print)
while server.advance():
    pass
server.submit("a", Request(ids=second, max_new_tokens=60), print)
for _ in range(8):
    server.advance()
print("half", flush=True)
sys.stdin.read()
"""


def test_a_server_that_dies_in_a_turn_takes_only_that_turn(parts: Parts, tmp_path: Path):
    turns = [prompt(t, 60) for t in range(2)]
    arguments = [str(parts.bundle.root), str(tmp_path), *(" ".join(map(str, ids)) for ids in turns)]
    command = [sys.executable, "-c", textwrap.dedent(DIES), *arguments]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and any(line == "half\n" for line in child.stdout)
    server = sharing(parts, tmp_path)
    busy = ask(server, "a", turns[1])
    assert busy.end and isinstance(busy.end.error, Unavailable) and "another server runs a turn" in busy.error
    child.kill()
    child.communicate()
    assert ask(server, "a", turns[1]).ids == alone(parts, turns, 6)[1]


def test_a_turn_waits_for_that_of_another_server(parts: Parts, tmp_path: Path):
    turns = [prompt(t, 60) for t in range(2)]
    one, other = sharing(parts, tmp_path), sharing(parts, tmp_path, wait_seconds=60.0)
    first, second = Heard(), Heard()
    one.submit("a", Request(ids=turns[0], max_new_tokens=6), first)
    one.advance()
    other.submit("a", Request(ids=turns[1], max_new_tokens=6), second)
    other.advance()
    assert second.end is None and other.held().waiting == 1
    run(one)
    run(other)
    assert [first.ids, second.ids] == alone(parts, turns, 6)


def test_what_ends_or_begins_elsewhere_does_so_here(parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    one, other = sharing(parts, tmp_path, batch=2), sharing(parts, tmp_path, batch=2)
    for name in "ab":
        ask(one, name, [5, 6])
    other.end_session("a")
    run(other)
    ask(other, "b", [7, 8], start=True)
    gone = ask(one, "a", [7, 8], start=False)
    assert gone.end and isinstance(gone.end.error, UnknownSession)
    assert ask(one, "b", [9, 9]).ids == alone(parts, [[7, 8], [9, 9]], 6)[1]
    with monkeypatch.context() as patch:
        patch.setattr(one.session, "save", lambda *_, **__: pytest.fail("what ends is not saved"))
        ask(one, "b", [9, 9], end_session=True)
    assert not list(tmp_path.glob(FILES)) and one.statistics.not_saved == 0


def test_a_turn_that_is_lost_is_taken_back(parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Also where the row cannot be made what it was: the file is."""
    server, turns = sharing(parts, tmp_path), [prompt(t, 60) for t in range(2)]
    ask(server, "a", turns[0])
    with monkeypatch.context() as patch:
        patch.setattr(server.session, "step", lambda *_: 1 / 0)
        patch.setattr(server.session, "undo_turn", lambda *_: 1 / 0)
        failed = ask(server, "a", turns[1])
    assert failed.end and failed.end.reason == "error" and failed.end.left == "undone"
    assert ask(server, "a", turns[1]).ids == alone(parts, turns, 6)[1]


def test_what_cannot_be_saved_is_one_servers(parts: Parts, tmp_path: Path):
    """No other goes on with what was before it."""
    folder, turns = tmp_path / "folder", [prompt(t, 60) for t in range(3)]
    one, other = sharing(parts, folder), sharing(parts, folder)
    ask(one, "a", turns[0])
    one.submit("a", Request(ids=turns[1], max_new_tokens=6), Heard())
    one.advance()
    hidden = folder.rename(tmp_path / "hidden")
    run(one)
    assert one.statistics.not_saved == 1
    hidden.rename(folder)
    ask(one, "a", turns[2])
    assert one.statistics.not_saved == 1
    third = ask(other, "a", [5, 6])
    assert third.ids == alone(parts, [*turns, [5, 6]], 6)[3]


def test_the_oldest_of_all_servers_goes(parts: Parts, tmp_path: Path):
    one, other = (sharing(parts, tmp_path, batch=4, max_sessions=2) for _ in range(2))
    for server, name in ((one, "a"), (other, "b"), (one, "c")):
        ask(server, name, [5, 6])
    assert len(list(tmp_path.glob(FILES))) == 2 and one.statistics.evicted == 1
    gone = ask(other, "a", [7, 8], start=False)
    assert gone.end and isinstance(gone.end.error, UnknownSession)


def test_folders_that_are_not_to_be_shared(parts: Parts, tmp_path: Path):
    mine = scheduler(parts, batch=1, on_full="save", folder=tmp_path / "mine")
    with pytest.raises(SemkvError, match="another server has its sessions there"):
        sharing(parts, tmp_path / "mine")
    mine.close()
    sharing(parts, tmp_path / "mine").close()
    open_session(parts.bundle, budget=0.5, threads=1).save(tmp_path / "other.safetensors")
    with pytest.raises(SemkvError, match="of another budget"):
        sharing(parts, tmp_path)
    shutil.rmtree(tmp_path / "mine")
