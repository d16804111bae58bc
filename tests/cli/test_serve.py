"""The command as a user runs it: it says where it listens, serves, and ends when it is told to."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from .commands import cli, refused


@contextmanager
def served(*arguments: object, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process, and the first line that it prints."""
    command = [sys.executable, "-m", "semkv_deploy.cli", "serve", *map(str, arguments), "--port", "0", "--threads", "1"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, text=True, env={**os.environ, **environment}, **pipes)
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline()
    finally:
        process.kill()
        process.communicate()


def test_it_serves_until_it_is_told_to_end_and_a_later_one_goes_on(tiny_bundle: Path, tmp_path: Path):
    """Told so during a stream, which comes whole; the second server knows the first one's conversation."""
    messages = [{"role": "user", "content": "Hello"}]
    body = {"model": "small", "messages": messages, "temperature": 0, "max_tokens": 100, "stream": True}
    body["stream_options"] = {"include_usage": True}
    headers = {"authorization": "Bearer sesame"}
    for end in (signal.SIGTERM, signal.SIGINT):
        arguments = (tiny_bundle, "--name", "small", "--rows", 2, "--save-sessions", tmp_path / "sessions")
        with served(*arguments, SEMKV_API_KEY="sesame") as (process, line):
            assert line.startswith("small: http://127.0.0.1:") and "budget 0.25 (75 % compression), 2 rows" in line
            url, lines = line.split()[1], []
            assert httpx.get(f"{url}/models", timeout=60).status_code == 401
            with httpx.stream("POST", f"{url}/chat/completions", json=body, headers=headers, timeout=60) as answer:
                for text in answer.iter_lines():
                    if not lines:
                        process.send_signal(end)
                    lines.append(text)
            assert process.wait(30) == 0 and process.stderr is not None and process.stderr.read() == ""
        assert lines[-2:] == ["data: [DONE]", ""]
        chunks = [json.loads(text.removeprefix("data: ")) for text in lines[:-2] if text]
        assert chunks[-2]["choices"][0]["finish_reason"] in ("length", "stop")
        reply = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks[:-1])
        messages += [{"role": "assistant", "content": reply}, {"role": "user", "content": "Why?"}]
    assert chunks[-1]["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    assert len(list((tmp_path / "sessions").glob("*.safetensors"))) == 1


def test_what_is_refused(tiny_bundle: Path, tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused(cli("serve", tiny_bundle, "--port", port), f"127.0.0.1:{port}: cannot listen", "Address already in use")
    refused(cli("serve", tiny_bundle, "--port", 0, "--api-key", ""), "--api-key: the key is empty")
    refused(cli("serve", tmp_path, "--port", 0), "not a bundle")
    refused(cli("serve", tiny_bundle, "--port", 0, "--budget", "0.3"), "0.3")


@pytest.mark.parametrize("missing", ["fastapi", "uvicorn"])
def test_without_its_packages_it_names_the_extra(missing: str, tiny_bundle: Path, tmp_path: Path):
    (tmp_path / f"{missing}.py").write_text(f"raise ImportError('absent', name='{missing}')")
    command = [sys.executable, "-m", "semkv_deploy.cli", "serve", str(tiny_bundle), "--port", "0"]
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    refused(result, f"serve: {missing} is not installed", "pip install 'semkv-deploy[serve]'")
