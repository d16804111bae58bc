"""Sessions that lose their row and come back over libsemkv's scheduler, and go on in Python's, and the reverse."""

from __future__ import annotations

import shutil
import stat
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from semkv_deploy.runtime.open import open_session
from semkv_deploy.serve.saved import SavedSessions, digest
from semkv_deploy.serve.scheduler import Scheduler
from semkv_deploy.serve.turn import Request

from ..serve.schedulers import Heard, Parts, run
from .driver import onnxruntime_library
from .test_scheduler import UNAVAILABLE, UNKNOWN, alone, conversation, schedule
from .test_scheduler_text import CHAT, in_python
from .test_text import libraries

FAILED = 3
FILES = "*.safetensors"


@pytest.fixture(scope="module")
def program(driver: Path) -> Path:
    return driver.parent / "semkv_schedule"


def python_server(bundle: Path, folder: Path, *, share: bool = False, **options: Any) -> Scheduler:
    parts = Parts.of(bundle)
    session = open_session(parts.bundle, budget=0.5, threads=1)
    given: dict[str, Any] = {"on_full": "save", "folder": folder, "share_folder": share, **options}
    stops = tuple(parts.bundle.manifest.model.eos_token_ids)
    return Scheduler(session, parts.tokenizer, stop_ids=stops, form=parts.form, **given)


def ask_python(server: Scheduler, name: str | None, turn: dict[str, Any]) -> Heard:
    heard = Heard()
    given = {key: turn[key] for key in ("ids", "text", "messages") if key in turn}
    server.submit(name, Request(**given, max_new_tokens=turn["most"]), heard)
    run(server)
    return heard


def ask_cpp(program: Path, bundle: Path, folder: Path, turns: list[dict[str, Any]], **options: Any) -> list[Any]:
    """By a server of its own, which ends with them."""
    given: dict[str, Any] = {"rows": 1, "save_sessions": str(folder), "genai": libraries()["genai"], **options}
    found: list[Any] = schedule(program, bundle, [turns], **given)["callers"][0]
    return found


def named(turn: dict[str, Any], name: str = "a", **more: Any) -> dict[str, Any]:
    return {**turn, "session": name, **more}


def test_sessions_share_a_row_and_are_what_they_are_alone(
    program: Path, bundle_of: Callable[..., Path], tmp_path: Path
):
    """Three callers on one row, each of whom loses it to the others; the last ones are saved as the server ends."""
    bundle, folder = bundle_of("semanticache"), tmp_path / "new" / "saved"
    callers = [[{**turn, "end": False} for turn in conversation(number, 3)] for number in range(3)]
    found = schedule(program, bundle, callers, rows=1, wait_seconds=120, save_sessions=str(folder))
    for turns, replies in zip(callers, found["callers"], strict=True):
        assert [each["error"] for each in replies] == [""] * 3
        assert [each["ids"] for each in replies] == alone(bundle, turns)
    assert found["statistics"]["sessions"] == 3 and found["statistics"]["evicted"] >= 2
    files = list(folder.glob(FILES))
    assert {path.stem for path in files} == {digest(f"s{number}") for number in range(3)}
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert not [path.name for path in folder.iterdir() if path.name.endswith(".partial")]


@pytest.mark.parametrize("name", ["semanticache", "sonic"])
def test_a_chat_goes_from_one_to_the_other(name: str, program: Path, bundle_of: Callable[..., Path], tmp_path: Path):
    """Each turn by a server of its own, in C++ and in Python by turns: as if it had never been saved."""
    bundle, replies, cached = bundle_of(name), [], []
    for number, turn in enumerate(CHAT):
        if number % 2 == 0:
            (reply,) = ask_cpp(program, bundle, tmp_path, [named(turn, start=number == 0)])
            assert reply["error"] == "", reply
            replies.append(reply["pieces"])
            cached.append(reply["cached_tokens"])
        else:
            server = python_server(bundle, tmp_path)
            heard = ask_python(server, "a", turn)
            assert heard.end is not None
            replies.append([event.text for event in heard.events[:-1]])
            cached.append(heard.end.cached_tokens)
            server.close()
    wanted = in_python(bundle, CHAT)
    assert replies == [each["pieces"] for each in wanted]
    assert cached == [each["cached_tokens"] for each in wanted] and cached[1] > 0


def test_python_knows_a_chat_of_cpps_by_its_messages(program: Path, bundle_of: Callable[..., Path], tmp_path: Path):
    """As the HTTP endpoint does, which has no names of sessions: alone in the folder, and sharing it."""
    bundle = bundle_of("semanticache")
    for share in (False, True):
        folder = tmp_path / str(share)
        turns = [named(CHAT[0], start=True), named(CHAT[2])]
        replies = ask_cpp(program, bundle, folder, turns, share_sessions=share)
        said = [{"role": "assistant", "content": "".join(reply["pieces"])} for reply in replies]
        messages = [*CHAT[0]["messages"], said[0], *CHAT[2]["messages"], said[1], {"role": "user", "content": "And?"}]
        server = python_server(bundle, folder, share=share)
        heard = ask_python(server, None, {"messages": messages, "most": 4})
        server.close()
        assert heard.end is not None
        assert heard.end.cached_tokens >= replies[1]["prompt_tokens"] > 0, share


def test_what_cannot_be_saved_keeps_its_row(program: Path, bundle_of: Callable[..., Path], tmp_path: Path):
    """The folder is gone: nobody is lost, the one who wants a row is told why there is none."""
    bundle, folder = bundle_of("semanticache"), tmp_path / "saved"
    first, second = conversation(1, 2)

    def remove() -> None:
        while not (folder / ".servers").exists():
            time.sleep(0.02)
        shutil.rmtree(folder)

    removing = threading.Thread(target=remove)
    removing.start()
    turns = [first, {"session": "b", "ids": [5, 6], "after_ms": 1500}, {**second, "end": False}]
    found = schedule(program, bundle, [turns], rows=1, wait_seconds=0, save_sessions=str(folder))
    removing.join()
    replies = found["callers"][0]
    assert replies[1]["fault"] == UNAVAILABLE
    assert "no row is free, and no idle session can be saved" in replies[1]["error"]
    assert "No such file or directory" in replies[1]["error"]
    assert [replies[0]["ids"], replies[2]["ids"]] == alone(bundle, [first, second])
    assert found["statistics"]["not_saved"] == 1 and found["statistics"]["evicted"] == 0


def test_a_damaged_session_is_gone_and_begins_anew(program: Path, bundle_of: Callable[..., Path], tmp_path: Path):
    bundle = bundle_of("semanticache")
    first = {**conversation(1, 2)[0], "session": "a"}
    ask_cpp(program, bundle, tmp_path, [first])
    (file,) = tmp_path.glob(FILES)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    turns = [{**first, "start": False}, {**first, "start": False}, first]
    replies = ask_cpp(program, bundle, tmp_path, turns)
    assert [each["fault"] for each in replies] == [FAILED, UNKNOWN, -1]
    assert "session a: the session is gone (got " in replies[0]["error"] and "damaged" in replies[0]["error"]
    assert replies[2]["ids"] == alone(bundle, [first])[0]


def test_sessions_that_end_and_the_oldest_leave_no_file(program: Path, bundle_of: Callable[..., Path], tmp_path: Path):
    bundle = bundle_of("semanticache")
    turn = {"ids": [5, 6], "most": 2}
    ask_cpp(program, bundle, tmp_path, [named(turn, "a"), named(turn, "b"), named(turn, "a", end=True)])
    assert [path.stem for path in tmp_path.glob(FILES)] == [digest("b")]
    replies = ask_cpp(program, bundle, tmp_path, [named(turn, "c"), named(turn, "d")], max_sessions=2)
    assert [each["error"] for each in replies] == ["", ""]
    assert {path.stem for path in tmp_path.glob(FILES)} == {digest("c"), digest("d")}, "b was idle longest"
    # A session that begins anew is not what was saved of it.
    (anew,) = ask_cpp(program, bundle, tmp_path, [named(turn, "c", start=True)])
    assert anew["cached_tokens"] == 0


def test_an_idle_session_is_saved_and_comes_back(program: Path, bundle_of: Callable[..., Path], tmp_path: Path):
    """Its row is free meanwhile; a turn that is broken off leaves what was saved before."""
    bundle = bundle_of("semanticache")
    first, second = conversation(1, 2)
    turns = [first, {**second, "after_ms": 1500, "end": False}]
    found = schedule(program, bundle, [turns], rows=2, idle_seconds=0.2, save_sessions=str(tmp_path))
    assert [each["ids"] for each in found["callers"][0]] == alone(bundle, [first, second])
    assert found["statistics"]["evicted"] >= 1 and found["statistics"]["sessions"] == 1


def refused(program: Path, bundle: Path, folder: Path, **options: Any) -> str:
    with pytest.raises(AssertionError) as failure:
        ask_cpp(program, bundle, folder, [{"ids": [5]}], **options)
    return str(failure.value)


def test_folders_that_are_not_to_be_used(program: Path, bundle_of: Callable[..., Path], tmp_path: Path):
    bundle = bundle_of("semanticache")
    mine, file, server = tmp_path / "mine", tmp_path / "file", python_server(bundle, tmp_path / "python")
    for options in ({}, {"share_sessions": True}):
        assert "another server has its sessions there" in refused(program, bundle, tmp_path / "python", **options)
    server.close()
    ask_cpp(program, bundle, tmp_path / "python", [{"ids": [5], "most": 1}])
    mine.mkdir()
    session = open_session(Parts.of(bundle).bundle, budget=0.5, threads=1)
    session.save(mine / "mine.safetensors")
    assert "mine.safetensors: not a server's session. Give sessions a folder of their own" in refused(
        program, bundle, mine
    )
    data = (mine / "mine.safetensors").read_bytes()
    (mine / "mine.safetensors").write_bytes(data[:-9])
    assert "not a saved session, or a damaged one" in refused(program, bundle, mine)
    (mine / "mine.safetensors").write_bytes(data.replace(b'"budget":"0.5"', b'"budget":"0.6"'))
    assert "is of another budget" in refused(program, bundle, mine)
    file.touch()
    assert "cannot be made: File exists" in refused(program, bundle, file)


# Sharing a folder.


def test_servers_of_both_kinds_share_a_folder(program: Path, bundle_of: Callable[..., Path], tmp_path: Path):
    """Turns of one session by whoever gets them, while both servers run: each reads what the other wrote."""
    bundle, turns = bundle_of("semanticache"), [{**turn, "temperature": 0.0} for turn in conversation(2, 5)]
    server = python_server(bundle, tmp_path, share=True)
    replies = [ask_python(server, "a", turns[0]).ids]
    for number in (1, 3):
        given = named({**turns[number], "start": False, "end": False})
        (reply,) = ask_cpp(program, bundle, tmp_path, [given], share_sessions=True)
        assert reply["error"] == ""
        replies.append(reply["ids"])
        replies.append(ask_python(server, "a", turns[number + 1]).ids)
    assert replies == alone(bundle, turns)
    server.end_session("a")
    run(server)
    (gone,) = ask_cpp(program, bundle, tmp_path, [named({**turns[0], "start": False})], share_sessions=True)
    assert gone["fault"] == UNKNOWN
    server.close()
    assert list(tmp_path.glob(FILES)) == []


def test_turns_of_a_session_wait_for_each_other_wherever_they_run(
    program: Path, bundle_of: Callable[..., Path], tmp_path: Path
):
    bundle = bundle_of("semanticache")
    turn = {"ids": [5, 6], "most": 30}
    server, heard = python_server(bundle, tmp_path, share=True), Heard()
    server.submit("a", Request(ids=[5, 6], max_new_tokens=30), heard)
    for _ in range(3):
        server.advance()
    assert heard.end is None and heard.ids, "the turn is running"
    given: dict[str, Any] = {"share_sessions": True, "wait_seconds": 0}
    (reply,) = ask_cpp(program, bundle, tmp_path, [named(turn)], **given)
    assert reply["fault"] == UNAVAILABLE
    assert reply["error"] == "session a: another server runs a turn of the session."
    run(server)
    (reply,) = ask_cpp(program, bundle, tmp_path, [named(turn)], **given)
    assert reply["cached_tokens"] == 32
    assert ask_python(server, "a", turn).end.cached_tokens == 64  # type: ignore[union-attr]
    server.close()
    assert [path.name for path in tmp_path.iterdir() if path.suffix not in (".safetensors",)] == [".servers"]


def test_a_server_that_dies_takes_no_turn_that_was_answered(
    program: Path, bundle_of: Callable[..., Path], tmp_path: Path
):
    """Killed while its second turn runs: the first is in the folder, and its lock is nobody's."""
    bundle = bundle_of("semanticache")
    first, second = (named(turn, start=None, end=False, temperature=0.0) for turn in conversation(2, 2))
    first.pop("start"), second.pop("start")
    import json

    given = {"callers": [[first, {**second, "most": 400}]], "rows": 1, "save_sessions": str(tmp_path)}
    text = json.dumps({**given, "share_sessions": True})
    process = subprocess.Popen(
        [str(program), str(bundle), onnxruntime_library(), "0.5"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    process.stdin.write(text.encode())
    process.stdin.close()
    end = time.monotonic() + 60
    while not list(tmp_path.glob(FILES)) and time.monotonic() < end:
        time.sleep(0.002)
    process.kill()
    process.wait()
    server = python_server(bundle, tmp_path, share=True)
    wanted = alone(bundle, [first, second])
    heard = ask_python(server, "a", second)
    server.close()
    assert heard.end is not None
    assert (heard.ids, heard.end.cached_tokens) == (wanted[1], 45 + len(wanted[0]))


def test_as_many_sessions_as_there_may_be_in_a_shared_folder(
    program: Path, bundle_of: Callable[..., Path], tmp_path: Path
):
    bundle, turn = bundle_of("semanticache"), {"ids": [5, 6], "most": 2}
    server = python_server(bundle, tmp_path, share=True, max_sessions=2)
    for name in "ab":
        ask_python(server, name, turn)
    server.close()
    (reply,) = ask_cpp(program, bundle, tmp_path, [named(turn, "c")], share_sessions=True, max_sessions=2)
    assert reply["error"] == ""
    assert {path.stem for path in tmp_path.glob(FILES)} == {digest("b"), digest("c")}
    saved = SavedSessions(tmp_path, server.session, shared=True)
    assert {name for name, _, _ in saved.found()} == {"b", "c"}
    saved.close()
