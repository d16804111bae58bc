"""A real Triton server with libsemkv's own backend, over the repository of `semkv-deploy triton --backend cpp`."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from semkv_deploy.serve.options import ServingOptions
from semkv_deploy.serve.triton.repository import write_repository

from ...runtime_cpp.conftest import BUILD, build
from ...runtime_cpp.driver import onnxruntime_library
from ..schedulers import Parts, alone, prompt
from .server import SERVER, Server
from .test_server import END, Grpc, ids_of, over_grpc, over_http, stream, until

pytestmark = pytest.mark.skipif(
    not (SERVER / "bin" / "tritonserver").is_file(), reason="no Triton server: scripts/triton.sh installs one"
)


@pytest.fixture(scope="module")
def backend() -> Path:
    """libtriton_semkv.so as users get it."""
    return build(BUILD / "runtime", "--driver", "--triton", "--prefix", str(BUILD / "semkv")) / "libtriton_semkv.so"


@pytest.fixture(scope="module")
def server(tiny_bundle: Path, backend: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`chat` has eight rows; `small` has one, for which nobody waits, and soon forgets; `saves` has one, and saves.

    There is no Python, and no library for texts.
    """
    folder = tmp_path_factory.mktemp("triton_cpp")
    options = ServingOptions(rows=8, threads=1, wait_seconds=120)
    write_repository(tiny_bundle, folder / "repository", "chat", options, budget=0.25, backend="cpp")
    small = ServingOptions(rows=1, threads=1, wait_seconds=0, idle_seconds=1, max_tokens=400)
    write_repository(tiny_bundle, folder / "repository", "small", small, budget=0.25, backend="cpp")
    saves = ServingOptions(rows=1, threads=1, wait_seconds=120, save_sessions=folder / "sessions")
    write_repository(tiny_bundle, folder / "repository", "saves", saves, budget=0.25, backend="cpp")
    found = Server(
        folder / "repository",
        folder,
        ["chat", "small", "saves"],
        native=backend,
        environment={"SEMKV_ONNXRUNTIME": onnxruntime_library(), "PYTHONPATH": ""},
    )
    yield found
    found.kill()


def test_sixteen_sessions_at_once(server: Server, parts: Parts):
    """Five turns each on eight rows, past the capacity: as each alone in Python. Over gRPC, then over HTTP by name."""
    turns = {session: [prompt(100 * session + turn, 25) for turn in range(5)] for session in range(1, 17)}
    replies: dict[int, list[list[int]]] = {session: [] for session in turns}
    threads = []
    for session, given in turns.items():
        ask = over_grpc if session % 2 else over_http
        threads.append(threading.Thread(target=ask, args=(server, session, given, replies[session])))
    # Sessions that are not ended keep their rows, and nobody forgets them here: half of them are over HTTP.
    for thread in threads[::2]:
        thread.start()
    for thread in threads[::2]:
        thread.join(240)
    for thread in threads[1::2]:
        thread.start()
    for thread in threads[1::2]:
        thread.join(240)
    for session, given in turns.items():
        assert replies[session] == alone(parts, given, 8, END), session
    assert until(lambda: server.metric("semkv_turns_total") == 80)
    assert server.metric("semkv_compressions_total") > 0
    assert server.metric("semkv_sessions") == server.metric("semkv_rows_used") == 8, "those over gRPC have ended"
    for session in range(2, 17, 2):
        assert httpx.post(
            url_of(server), json={"session_id": f"s{session}", "end_session": True}, timeout=60
        ).is_success
    assert until(lambda: server.metric("semkv_rows_used") == 0)


def url_of(server: Server, model: str = "chat") -> str:
    return f"{server.url}/v2/models/{model}/generate"


def test_one_response_sampling_and_stop_ids(server: Server, parts: Parts):
    tokenizer = parts.tokenizer
    given: dict[str, Any] = {"input_ids": prompt(1, 9), "max_tokens": 12, "temperature": 1.5, "top_k": 50, "seed": 7}
    whole = httpx.post(url_of(server), json={**given, "stream": False}, timeout=60).json()
    assert whole["finish_reason"] == "length" and len(whole["output_ids"]) == 12
    assert (whole["prompt_tokens"], whole["cached_tokens"]) == (9, 0)
    text = tokenizer.decode(whole["output_ids"], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert whole["text_output"] == text != "", "tokens have a text without the library, too"
    assert ids_of(stream(server, **given)) == whole["output_ids"], "the same seed draws the same tokens"
    others = ids_of(stream(server, **{**given, "seed": 8}))
    assert others != whole["output_ids"]
    third = whole["output_ids"][2]
    events = list(stream(server, **given, stop_ids=[third]))
    assert ids_of(events) == whole["output_ids"][: whole["output_ids"].index(third)]
    assert events[-1]["finish_reason"] == "stop"


def test_sequences_by_name(server: Server, parts: Parts):
    """A correlation id may be a text; END frees the row."""
    turns = [prompt(70 + turn, 30) for turn in range(3)]
    client = Grpc(server)
    replies = []
    for number, ids in enumerate(turns):
        client.ask(ids, sequence_id="a name", sequence_start=number == 0, sequence_end=number == 2)
        replies.append(client.reply())
    client.client.stop_stream()
    assert replies == alone(parts, turns, 8, END)
    assert until(lambda: server.metric("semkv_rows_used") == 0)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "wrong ids": ({"input_ids": [5, 512]}, "no token of the model has this id (expected 0 to 511, got 512)"),
    "too long": ({"input_ids": [5] * 600}, "600 more tokens do not fit the context"),
    "unknown session": ({"session_id": "who", "input_ids": [5]}, "session who: there is no such session"),
    "nothing": ({}, "text_input, input_ids: a turn has a text or tokens (expected one of them, got none)"),
    "a session without a name": ({"input_ids": [5], "start_session": True}, "has no name"),
    "a text": ({"text_input": "Hello"}, "onnxruntime-genai's library does not load"),
    "a system message": ({"input_ids": [5], "system": "Hello"}, "Install onnxruntime-genai 0.18 or newer"),
    "a text for a number": ({"input_ids": [5], "max_tokens": "many"}, "data"),
    "two temperatures": ({"input_ids": [5], "temperature": [1.0, 2.0]}, "temperature"),
    "a temperature below 0": ({"input_ids": [5], "temperature": -1.0}, "temperature: out of range"),
    "no tokens": ({"input_ids": [5], "max_tokens": 0}, "max_tokens: out of range (expected 1 to 512, got 0)"),
}


def test_what_is_refused_disturbs_nobody(server: Server, parts: Parts):
    """Each while another session streams."""
    ids, heard = prompt(3, 9), []
    asked: dict[str, Any] = {"input_ids": ids, "max_tokens": 300}
    other = threading.Thread(target=lambda: heard.extend(stream(server, **asked)))
    other.start()
    for name, (given, words) in BAD.items():
        answer = httpx.post(url_of(server), json=given, timeout=60)
        assert answer.status_code >= 400 and words in answer.json()["error"], (name, answer.text)
    other.join(120)
    assert ids_of(heard) == alone(parts, [ids], 300, END)[0]


@pytest.mark.parametrize("over", ["HTTP", "gRPC"])
def test_a_client_that_goes_frees_its_row(over: str, server: Server):
    before = server.metric("semkv_cancelled_total")
    # On a busy machine a reply of so small a model may be over before its client has gone.
    for _ in range(20):
        if over == "HTTP":
            events = stream(server, input_ids=[5, 6], max_tokens=500)
            next(events)
            events.close()
        else:
            client = Grpc(server)
            client.ask([5, 6], max_tokens=500)
            client.next()
            client.client.stop_stream(cancel_requests=True)
        if until(lambda: server.metric("semkv_cancelled_total") > before, seconds=3):
            break
    assert server.metric("semkv_cancelled_total") > before
    assert until(lambda: server.metric("semkv_running") == server.metric("semkv_rows_used") == 0)


def test_rows_run_out_and_idle_sessions_lose_theirs(server: Server):
    given = {"session_id": "a", "start_session": True, "input_ids": [5, 6], "max_tokens": 2}
    assert len(ids_of(stream(server, "small", **given))) == 2
    (refused,) = stream(server, "small", **{**given, "session_id": "b"})
    assert "no row is free (got 0 of 1 rows generate, the others hold sessions)" in refused["error"]
    assert until(lambda: server.metric("semkv_rows_used", "small") == 0)
    (gone,) = stream(server, "small", session_id="a", input_ids=[5])
    assert "lost its row while it was idle" in gone["error"]
    assert len(ids_of(stream(server, "small", **{**given, "session_id": "b"}))) == 2
    assert until(lambda: server.metric("semkv_refused_total", "small") == 1)
    assert server.metric("semkv_evicted_total", "small") >= 1


def ready(server: Server, model: str) -> bool:
    return httpx.get(f"{server.url}/v2/models/{model}/ready", timeout=20).status_code == 200


def test_unload_during_a_stream(server: Server, parts: Parts):
    """What runs comes whole, and what comes later is refused by Triton."""
    assert until(lambda: server.metric("semkv_rows_used", "small") == 0)
    ids = prompt(3, 9)
    events = stream(server, "small", input_ids=ids, max_tokens=300)
    first = next(events)
    unloading = threading.Thread(
        target=lambda: httpx.post(f"{server.url}/v2/repository/models/small/unload", timeout=60)
    )
    unloading.start()
    assert ids_of([first, *events]) == alone(parts, [ids], 300, END)[0]
    unloading.join(60)

    assert until(lambda: not ready(server, "small"))
    repository_call(server, "small", "load")
    assert until(lambda: ready(server, "small"))
    assert ids_of(stream(server, "small", input_ids=ids, max_tokens=8)) == alone(parts, [ids], 8, END)[0]


def repository_call(server: Server, model: str, what: str) -> None:
    answer = httpx.post(f"{server.url}/v2/repository/models/{model}/{what}", timeout=60)
    assert answer.is_success, answer.text


def test_sessions_are_saved_for_a_row_and_for_a_later_model(server: Server, parts: Parts):
    """Two sessions on one row, by turns; the model is unloaded between two of their turns."""
    turns = {name: [prompt(900 + ord(name) + turn, 60) for turn in range(3)] for name in "ab"}
    replies: dict[str, list[list[int]]] = {name: [] for name in turns}
    for turn in range(3):
        if turn == 2:
            repository_call(server, "saves", "unload")
            assert until(lambda: not ready(server, "saves"))
            assert len(list((server.log.parent / "sessions").glob("*.safetensors"))) == 2
            repository_call(server, "saves", "load")
            assert until(lambda: ready(server, "saves"))
        for name, given in turns.items():
            asked = {"session_id": name, "start_session": turn == 0, "input_ids": given[turn], "max_tokens": 8}
            replies[name].append(ids_of(stream(server, "saves", **asked)))
    for name, given in turns.items():
        assert replies[name] == alone(parts, given, 8, END)
    assert until(lambda: server.metric("semkv_evicted_total", "saves") >= 1)


@pytest.mark.parametrize(
    "parameter, sentence",
    [
        ('key: "rows", value { string_value: "none" }', "parameter rows: not a number of a sensible size"),
        ('key: "surprise", value { string_value: "1" }', "the C++ backend does not know the parameter (got surprise)"),
        ('key: "budget", value { string_value: "0.3" }', "the target was not built for this budget"),
        ('key: "genai", value { string_value: "/nowhere" }', "onnxruntime-genai's library does not load"),
        ('key: "share_sessions", value { string_value: "true" }', "sessions are shared in a folder"),
        ('key: "share_sessions", value { string_value: "maybe" }', "share_sessions: neither true nor false"),
    ],
)
def test_models_that_do_not_load(parameter: str, sentence: str, server: Server, tiny_bundle: Path):
    """Triton says why."""
    repository = server.log.parent / "repository"
    model = write_repository(tiny_bundle, repository, "spoilt", ServingOptions(), backend="cpp", force=True)
    config = model / "config.pbtxt"
    key = parameter.split('"')[1]
    lines = [line for line in config.read_text().splitlines() if f'key: "{key}"' not in line]
    config.write_text("\n".join([*lines, f"parameters {{ {parameter} }}"]) + "\n")
    answer = httpx.post(f"{server.url}/v2/repository/models/spoilt/load", timeout=60)
    assert answer.status_code >= 400 and sentence in answer.text, answer.text
