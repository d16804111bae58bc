"""A real Triton server over the repository that `semkv-deploy triton` writes, asked over HTTP and gRPC."""

from __future__ import annotations

import json
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from semkv_deploy.serve.options import ServingOptions
from semkv_deploy.serve.triton.repository import write_repository

from ..schedulers import Parts, alone, prompt
from .server import INSTALLED, ROOT, Server, absent

pytestmark = pytest.mark.skipif(absent() is not None, reason=str(absent()))


END = (1,)
"""The tiny model's end of text."""


class Running:
    """The server that runs now: `restart` makes another."""

    def __init__(self, repository: Path, folder: Path) -> None:
        self._arguments = (repository, folder)
        self.server = Server(repository, folder, ["chat", "small"])

    def restart(self, models: list[str]) -> None:
        self.server.terminate()
        self.server = Server(*self._arguments, models)


@pytest.fixture(scope="module")
def running(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """`chat` has eight rows and saves sessions; `small` has one row, for which nobody waits, and soon forgets."""
    folder = tmp_path_factory.mktemp("triton")
    options = ServingOptions(rows=8, threads=1, wait_seconds=120, save_sessions=folder / "sessions")
    write_repository(tiny_bundle, folder / "repository", "chat", options, budget=0.25)
    small = ServingOptions(rows=1, threads=1, wait_seconds=0, idle_seconds=1)
    write_repository(tiny_bundle, folder / "repository", "small", small, budget=0.25)
    found = Running(folder / "repository", folder)
    yield found
    found.server.kill()


def stream(server: Server, model: str = "chat", **given: Any) -> Iterator[dict[str, Any]]:
    """Responses over HTTP, as server-sent events."""
    url = f"{server.url}/v2/models/{model}/generate_stream"
    with httpx.stream("POST", url, json=given, timeout=120) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: "):
                yield json.loads(line.removeprefix("data: "))


def ids_of(responses: Iterator[dict[str, Any]] | list[dict[str, Any]]) -> list[int]:
    ids: list[int] = []
    for each in responses:
        assert "error" not in each, each
        # Triton writes one element as it is, and several as a list.
        ids += each["output_ids"] if isinstance(each["output_ids"], list) else [each["output_ids"]]
    return ids


def over_http(server: Server, session: int, turns: list[list[int]], replies: list[list[int]]) -> None:
    for number, ids in enumerate(turns):
        given = {"session_id": f"s{session}", "start_session": number == 0, "input_ids": ids, "max_tokens": 8}
        replies.append(ids_of(stream(server, **given)))


class Grpc:
    """A gRPC stream."""

    def __init__(self, server: Server) -> None:
        sys.path.append(str(INSTALLED))
        import tritonclient.grpc as triton

        self._triton, self._heard = triton, queue.Queue[Any]()
        self.client = triton.InferenceServerClient(f"127.0.0.1:{server.grpc}")
        self.client.start_stream(lambda result, error: self._heard.put(error or result))

    def ask(self, ids: list[int], max_tokens: int = 8, **sequence: Any) -> None:
        given = {"input_ids": np.array(ids, np.int64), "max_tokens": np.array([max_tokens], np.int32)}
        self.ask_of("chat", given, **sequence)

    def ask_of(self, model: str, given: dict[str, Any], **sequence: Any) -> None:
        """A request with these arrays; texts are arrays of bytes."""
        inputs = []
        for name, array in given.items():
            kind = {"object": "BYTES", "bool": "BOOL", "float32": "FP32"}.get(
                str(array.dtype), str(array.dtype).upper()
            )
            inputs.append(self._triton.InferInput(name, list(array.shape), kind))
            inputs[-1].set_data_from_numpy(array)
        self.client.async_stream_infer(model, inputs, enable_empty_final_response=True, **sequence)

    def next(self) -> Any:
        return self._heard.get(timeout=120)

    def reply(self) -> list[int]:
        ids: list[int] = []
        while True:
            result = self.next()
            assert not isinstance(result, Exception), result
            ids += result.as_numpy("output_ids").tolist()
            if result.get_response().parameters["triton_final_response"].bool_param:
                return ids


def over_grpc(server: Server, session: int, turns: list[list[int]], replies: list[list[int]]) -> None:
    client = Grpc(server)
    for number, ids in enumerate(turns):
        first, last = number == 0, number == len(turns) - 1
        client.ask(ids, sequence_id=session, sequence_start=first, sequence_end=last)
        replies.append(client.reply())
    client.client.stop_stream()


def until(condition: Callable[[], bool], seconds: float = 30) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def test_sixteen_sessions_at_once(running: Running, parts: Parts):
    """Five turns each on eight rows, eight over HTTP by name and eight over gRPC as sequences; past the capacity."""
    turns = {session: [prompt(100 * session + turn, 25) for turn in range(5)] for session in range(1, 17)}
    replies: dict[int, list[list[int]]] = {session: [] for session in turns}
    threads = []
    for session, given in turns.items():
        ask = over_grpc if session % 2 else over_http
        threads.append(threading.Thread(target=ask, args=(running.server, session, given, replies[session])))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(240)
    for session, given in turns.items():
        assert replies[session] == alone(parts, given, 8, END), session
    assert until(lambda: running.server.metric("semkv_turns_total") == 80)
    assert running.server.metric("semkv_compressions_total") > 0 and running.server.metric("semkv_evicted_total") > 0
    assert running.server.metric("semkv_sessions") == 8, "those over gRPC have ended"


def test_one_response_and_text(running: Running):
    url = f"{running.server.url}/v2/models/chat/generate"
    given = {"text_input": "Hello", "max_tokens": 6, "session_id": "t", "start_session": True}
    whole = httpx.post(url, json={**given, "stream": False}, timeout=60).json()
    assert whole["finish_reason"] == "length" and len(whole["output_ids"]) == 6
    events = list(stream(running.server, **given))
    assert ids_of(events) == whole["output_ids"]
    assert "".join(each["text_output"] for each in events) == whole["text_output"]
    ended = httpx.post(url, json={"session_id": "t", "end_session": True}, timeout=60).json()
    assert ended["finish_reason"] == "ended"


def test_the_example_of_the_page(running: Running):
    command = [sys.executable, str(ROOT / "examples" / "triton_chat.py"), f"{running.server.url}/v2/models/chat"]
    done = subprocess.run([*command, "Hello", "Why?"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (seen, none), (_, cached) = re.findall(r"\[(\d+) tokens, (\d+) of them in the cache already\]", done.stdout)
    assert none == "0" and int(cached) >= int(seen)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "wrong ids": ({"input_ids": [5, 512]}, "no token of the model has this id"),
    "too long": ({"input_ids": [5] * 600}, "600 more tokens do not fit the context"),
    "unknown session": ({"session_id": "who", "input_ids": [5]}, "session who: there is no such session"),
    "nothing": ({}, "a turn has a text or tokens"),
    "a text for a number": ({"input_ids": [5], "max_tokens": "many"}, "data"),
    "two temperatures": ({"input_ids": [5], "temperature": [1.0, 2.0]}, "temperature"),
}


def test_what_is_refused_disturbs_nobody(running: Running, parts: Parts):
    """Each while another session streams."""
    ids, heard = prompt(3, 9), []
    asked: dict[str, Any] = {"session_id": "o", "start_session": True, "input_ids": ids, "max_tokens": 300}
    other = threading.Thread(target=lambda: heard.extend(stream(running.server, **asked)))
    other.start()
    for name, (given, words) in BAD.items():
        answer = httpx.post(f"{running.server.url}/v2/models/chat/generate", json=given, timeout=60)
        assert answer.status_code >= 400 and words in answer.json()["error"], (name, answer.text)
    other.join(120)
    assert ids_of(heard) == alone(parts, [ids], 300, END)[0]


@pytest.mark.parametrize("over", ["HTTP", "gRPC"])
def test_a_client_that_goes_frees_its_row(over: str, running: Running):
    before = running.server.metric("semkv_cancelled_total")
    # On a busy machine a reply of so small a model may be over before its client has gone.
    for _ in range(10):
        if over == "HTTP":
            events = stream(running.server, input_ids=[5, 6], max_tokens=500)
            next(events)
            events.close()
        else:
            client = Grpc(running.server)
            client.ask([5, 6], max_tokens=500)
            client.next()
            client.client.stop_stream(cancel_requests=True)
        if until(lambda: running.server.metric("semkv_cancelled_total") == before + 1, seconds=5):
            break
    assert running.server.metric("semkv_cancelled_total") == before + 1
    assert until(lambda: running.server.metric("semkv_running") == 0)


def test_rows_run_out_and_idle_sessions_lose_theirs(running: Running):
    before = running.server.metric("semkv_turns_total", "small")

    def looked_at(turns: int) -> bool:
        """Metrics are those of the model's last look around: not those of before these turns."""
        return until(lambda: running.server.metric("semkv_turns_total", "small") == before + turns)

    given = {"session_id": "a", "start_session": True, "input_ids": [5, 6], "max_tokens": 2}
    assert len(ids_of(stream(running.server, "small", **given))) == 2
    assert looked_at(1)
    (refused,) = stream(running.server, "small", **{**given, "session_id": "b"})
    assert "no row is free (got 0 of 1 rows generate, the others hold sessions)" in refused["error"]
    assert until(lambda: running.server.metric("semkv_rows_used", "small") == 0)
    (gone,) = stream(running.server, "small", session_id="a", input_ids=[5])
    assert "lost its row while it was idle" in gone["error"]
    assert len(ids_of(stream(running.server, "small", **{**given, "session_id": "b"}))) == 2
    assert looked_at(4)


def test_unload_during_a_stream(running: Running, parts: Parts):
    """What runs comes whole, and what comes later is refused by Triton."""
    url = f"{running.server.url}/v2/repository/models/small/unload"
    assert until(lambda: running.server.metric("semkv_rows_used", "small") == 0)
    ids = prompt(3, 9)
    events = stream(running.server, "small", input_ids=ids, max_tokens=300)
    first = next(events)
    unloading = threading.Thread(target=lambda: httpx.post(url, timeout=60))
    unloading.start()
    assert ids_of([first, *events]) == alone(parts, [ids], 300, END)[0]
    unloading.join(60)

    def ready() -> bool:
        return httpx.get(f"{running.server.url}/v2/models/small/ready", timeout=20).status_code == 200

    assert until(lambda: not ready())
    gone = httpx.post(f"{running.server.url}/v2/models/small/generate", json={"input_ids": ids}, timeout=20)
    assert gone.status_code >= 400 and "small" in gone.json()["error"]


def test_a_server_that_starts_again_goes_on(running: Running, parts: Parts):
    """A session that holds a row is saved when the server ends, one that is saved stays so."""
    turns = [prompt(900 + turn, 60) for turn in range(3)]
    replies: list[list[int]] = []
    over_http(running.server, 90, turns[:2], replies)
    running.restart(["chat"])
    replies.append(ids_of(stream(running.server, session_id="s90", input_ids=turns[2], max_tokens=8)))
    assert replies == alone(parts, turns, 8, END)
