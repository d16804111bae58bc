"""One real Triton with both backends: the same turns, streamed over gRPC, give the same responses.

Both share a folder of sessions.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from semkv_deploy.serve.options import ServingOptions
from semkv_deploy.serve.triton.repository import write_repository

from ...runtime_cpp.test_text import libraries
from ..schedulers import prompt
from .server import Server, absent
from .test_server import Grpc
from .test_server_cpp import backend  # noqa: F401

pytestmark = pytest.mark.skipif(absent() is not None, reason=str(absent()))

MODELS = ("python", "cpp")
NUMBERS = ("prompt_tokens", "cached_tokens")


@pytest.fixture(scope="module")
def server(
    tiny_bundle: Path,
    backend: Path,  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("triton_both")
    saved = {"save_sessions": folder / "sessions", "share_sessions": True}
    options = ServingOptions(rows=2, threads=1, wait_seconds=120, **saved)
    for name in MODELS:
        write_repository(tiny_bundle, folder / "repository", name, options, budget=0.25, backend=name)
    of = libraries()
    environment = {"SEMKV_ONNXRUNTIME": of["onnxruntime"], "SEMKV_GENAI": of["genai"]}
    found = Server(folder / "repository", folder, [*MODELS], native=backend, both=True, environment=environment)
    yield found
    found.kill()


def arrays(turn: dict[str, Any]) -> dict[str, Any]:
    """A turn's inputs as arrays of the types that config.pbtxt says."""
    kinds: dict[str, Any] = {"max_tokens": np.int32, "top_k": np.int32, "seed": np.uint64, "temperature": np.float32}
    given: dict[str, Any] = {}
    for name, value in turn.items():
        several = value if isinstance(value, list) else [value]
        texts = isinstance(several[0], str)
        elements = [each.encode() for each in several] if texts else several
        given[name] = np.array(elements, np.object_ if texts else kinds.get(name))
    return given


def told(client: Grpc, model: str, turn: dict[str, Any]) -> list[Any]:
    """Everything that is streamed of a turn: ids and text of each response, and what the last one says; or an error."""
    client.ask_of(model, arrays(turn))
    responses: list[Any] = []
    while True:
        result = client.next()
        if isinstance(result, Exception):
            return [*responses, str(result)]
        text = result.as_numpy("text_output")
        response = [result.as_numpy("output_ids").tolist(), text[0].decode() if text is not None and len(text) else ""]
        if result.as_numpy("finish_reason") is not None:
            response += [result.as_numpy("finish_reason")[0].decode()]
            response += [int(result.as_numpy(name)[0]) for name in NUMBERS]
        responses.append(response)
        if result.get_response().parameters["triton_final_response"].bool_param:
            return responses


def by_name(turn: dict[str, Any], model: str) -> dict[str, Any]:
    """A turn of a session that only this model has."""
    return {**turn, "session_id": f"{turn['session_id']} of {model}"} if "session_id" in turn else turn


def chat(session: str) -> list[dict[str, Any]]:
    begin: dict[str, Any] = {"session_id": session, "start_session": True, "max_tokens": 10}
    more = {"session_id": session, "max_tokens": 10}
    return [
        {**begin, "text_input": "Why is the sky blue?", "system": "Be brief. ä 👍"},
        {**more, "text_input": "And at night? " * 6},
        {**more, "text_input": "“quoted”", "temperature": 1.5, "top_k": 40, "seed": 7},
        {**more, "text_input": "Go on, and at length. " * 5, "stream": False},
        {**more, "text_input": "The end.", "stop": ["zzz", " "], "end_session": True},
    ]


CASES: dict[str, list[dict[str, Any]]] = {
    "a chat": chat("c"),
    "texts as they are": [
        {"session_id": "r", "start_session": True, "text_input": "Once ", "raw": True, "max_tokens": 10},
        {"session_id": "r", "input_ids": prompt(3, 40), "max_tokens": 10},
        {"session_id": "r", "text_input": "<|im_end|> 漢字", "raw": True, "max_tokens": 10, "end_session": True},
    ],
    "refused": [
        {"text_input": "a", "input_ids": [5]},
        {"max_tokens": 3},
        {"input_ids": [5], "system": "a"},
        {"text_input": "a", "system": "a", "raw": True},
        {"text_input": "a", "stop": ["b", ""]},
        {"text_input": "a " * 900},
        {"text_input": "a", "max_tokens": 1000},
        {"text_input": "a", "temperature": -1.0},
    ],
}


@pytest.mark.parametrize("case", CASES)
def test_the_same_responses(case: str, server: Server):
    client = Grpc(server)
    turns = CASES[case]
    python, cpp = ([told(client, model, by_name(turn, model)) for turn in turns] for model in MODELS)
    client.client.stop_stream()
    if case == "refused":
        assert all(isinstance(responses[-1], str) for responses in python)
        for turn, theirs, ours in zip(turns, python, cpp, strict=True):
            assert sentence(ours[-1]) == sentence(theirs[-1]), turn
    else:
        assert cpp == python
        assert all(responses[-1][2] in ("length", "stop") for responses in python)


def sentence(error: str) -> str:
    """What was wrong, without where."""
    return error.split(": ")[-1].split(" (")[0].rstrip(".")


def test_a_stop_text_over_the_boundaries_of_tokens(server: Server):
    """Wherever in the reply it lies: what is shown ends before it; what was held back is shown where it was none."""
    client = Grpc(server)
    asked: dict[str, Any] = {"text_input": "Hello", "max_tokens": 14}
    whole = told(client, "python", asked)
    text = "".join(response[1] for response in whole)
    assert len(text) > 9
    stops = [text[begin:end] for begin, end in ((2, 6), (5, 6), (len(text) - 4, len(text)))]
    for stop in [[stops[0]], stops[1:], [text[3:] + "?"]]:
        python, cpp = (told(client, model, {**asked, "stop": stop}) for model in MODELS)
        assert cpp == python, stop
    client.client.stop_stream()


def test_a_session_goes_from_one_backend_to_the_other(server: Server):
    """By turns, with both running: as by one of them alone."""
    client, turns = Grpc(server), chat("both")
    alone = [told(client, "python", by_name(turn, "python")) for turn in turns]
    shared = [told(client, MODELS[number % 2], turn) for number, turn in enumerate(turns)]
    client.client.stop_stream()
    assert shared == alone
    assert all(responses[-1][4] > 0 for responses in alone[1:]), "tokens were in the cache"
