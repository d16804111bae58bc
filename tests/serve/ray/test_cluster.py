"""Two replicas on a local cluster of Ray: conversations outlive the replica that has them."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from semkv_deploy.errors import SemkvError

from ..http.conftest import serving
from ..schedulers import Parts, scheduler

pytest.importorskip("ray.serve", reason="Ray is not installed")
EXAMPLE = Path(__file__).parents[3] / "examples" / "ray" / "serve.yaml"
ROWS = 2


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of Serve's proxy."""
    import ray
    from ray import serve

    port = free_port()
    ray.init(num_cpus=3, include_dashboard=False, configure_logging=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()


@pytest.fixture(scope="module")
def deployed(cluster: str, parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The example's application, over the tiny bundle."""
    from ray import serve
    from ray.serve.schema import ServeDeploySchema

    (example,) = ServeDeploySchema.model_validate(yaml.safe_load(EXAMPLE.read_text())).applications
    module, _, name = example.import_path.partition(":")
    of = __import__(module, fromlist=[name])
    folder = tmp_path_factory.mktemp("sessions")
    given = {
        **example.args,
        "bundle": parts.bundle.root,
        "budget": 0.25,
        "name": "tiny",
        "max_replicas": 2,
        "serving": {**example.args["serving"], "rows": ROWS, "threads": 1, "save_sessions": folder},
    }
    serve.run(getattr(of, name)(of.RayArguments.model_validate(given)), name="chat", route_prefix=example.route_prefix)
    return cluster


def replicas() -> list[psutil.Process]:
    """Processes of the replicas."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile
            if "ServeReplica:chat" in " ".join(child.cmdline()):
                found.append(child)
    return found


def replicas_are(count: int) -> bool:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if len(replicas()) >= count:
            return True
        time.sleep(0.2)
    return False


def client(url: str, **options: Any) -> Any:
    from openai import OpenAI

    return OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=5, timeout=60, **options)


def talk(url: str, turns: int, between: Any = lambda turn: None, **options: Any) -> tuple[list[str], list[int]]:
    """Replies of a conversation, and how many tokens were known to the session before each."""
    messages: list[Any] = []
    replies, known = [], []
    for turn in range(turns):
        between(turn)
        messages.append({"role": "user", "content": f"Say number {turn}, and what you said before"})
        reply = client(url).chat.completions.create(
            model="tiny", messages=messages, max_tokens=8, temperature=0, **options
        )
        replies.append(reply.choices[0].message.content)
        known.append(reply.usage.prompt_tokens_details.cached_tokens)
        messages.append({"role": "assistant", "content": replies[-1]})
    return replies, known


@pytest.fixture(scope="module")
def alone(parts: Parts) -> list[str]:
    with serving(scheduler(parts, batch=1)) as served:
        from openai import OpenAI

        messages: list[Any] = []
        replies = []
        with OpenAI(base_url=f"{served.url}/v1", api_key="sesame") as one:
            for turn in range(4):
                messages.append({"role": "user", "content": f"Say number {turn}, and what you said before"})
                said = one.chat.completions.create(model="tiny", messages=messages, max_tokens=8, temperature=0)
                replies.append(said.choices[0].message.content)
                messages.append({"role": "assistant", "content": replies[-1]})
        return replies


def test_calls_go_to_any_replica(deployed: str, alone: list[str]):
    assert replicas_are(2)
    replies, known = talk(deployed, 4)
    assert replies == alone and known == sorted(known) and known[0] == 0 < known[1]


def test_a_session_may_be_named_for_the_router(deployed: str, alone: list[str]):
    assert talk(deployed, 4, extra_headers={"serve_multiplexed_model_id": "mine"})[0] == alone


def test_a_replica_that_is_killed_takes_nothing_that_was_answered(deployed: str, alone: list[str]):
    """Before the second turn and the third one is killed; in the end no replica is one that there was at first."""
    first = {process.pid for process in replicas()}

    def kill_one(turn: int) -> None:
        if turn in (1, 2):
            victim = next(process for process in replicas() if process.pid in first)
            victim.kill()
            victim.wait(20)
            assert replicas_are(2)

    replies, known = talk(deployed, 4, kill_one)
    assert replies == alone and known[0] == 0 < known[1] < known[2] < known[3]
    assert not first & {process.pid for process in replicas()}


def test_what_does_not_go_together(parts: Parts, tmp_path: Path):
    from semkv_deploy.serve.ray.app import RayArguments

    with pytest.raises(SemkvError, match=r"serving\.save_sessions: replicas share their sessions in a folder"):
        RayArguments.model_validate({"bundle": parts.bundle.root, "serving": {}})
    with pytest.raises(SemkvError, match="max_replicas: fewer than there are at least"):
        RayArguments.model_validate(
            {"bundle": parts.bundle.root, "serving": {"save_sessions": tmp_path}, "min_replicas": 3, "max_replicas": 2}
        )
