"""Under sanitizers, with the real ONNX Runtime: every behaviour once, and threads."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from semkv_deploy import open_bundle, open_session
from semkv_deploy.runtime.session import Session
from semkv_deploy.targets.onnxruntime.engine import OnnxRuntimeEngine

from .driver import CppError, Driver, onnxruntime_library
from .tensorrt.conftest import Fake, trt_bundle  # noqa: F401
from .test_equality import converse
from .test_scheduler import alone, conversation, schedule
from .test_scheduler_text import CHAT, in_python
from .test_text import libraries


@pytest.mark.parametrize("name", ["semanticache", "importance", "sonic", "dynsplit", "dynsplit-select"])
def test_a_conversation_touches_no_memory_that_is_not_its_own(
    name: str, address_driver: Path, bundle_of: Callable[..., Path], tmp_path: Path
):
    bundle = bundle_of(name)
    session = open_session(open_bundle(bundle), batch=2, threads=1)
    with Driver(address_driver, {"ASAN_OPTIONS": "detect_leaks=1"}) as cpp:
        cpp.open(bundle, 2)
        converse(session, cpp, 0, tmp_path, turns=2)
        with pytest.raises(CppError, match="no token of the model"):
            cpp.prefill([[999], []])
        cpp("load", path=str(tmp_path / "cpp"))
        cpp("generate", rows=[[5, 6, 7], [8]], most=4)
        cpp("close")


def test_nor_on_tensorrts_api(
    address_driver: Path,
    trt_bundle: Callable[..., Path],  # noqa: F811
    tmp_path: Path,
):
    """With stand-ins for TensorRT and CUDA, whose memory is the host's: it is seen there as well."""
    bundle, target, fake = trt_bundle("semanticache", "tensorrt"), "tensorrt", Fake(address_driver.parent, tmp_path)
    session = Session(OnnxRuntimeEngine(open_bundle(bundle).built(target), batch=2, threads=1))
    with fake.driver(bundle, target, ASAN_OPTIONS="detect_leaks=0") as cpp:
        cpp.open(bundle, 2, target=target, **fake.libraries())
        converse(session, cpp, 0, tmp_path, turns=2)
        cpp("close")


def test_two_sessions_in_two_threads_and_a_third_that_cancels(thread_driver: Path, bundle_of: Callable[..., Path]):
    """The one that is let be gives what it gives alone; what the other gave out before it was cancelled stays."""
    # ONNX Runtime is not instrumented: what its own threads do between themselves cannot be seen, and is not ours.
    command = [str(thread_driver), "threads", str(bundle_of("semanticache")), onnxruntime_library(), "2"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={"TSAN_OPTIONS": "ignore_noninstrumented_modules=1 halt_on_error=1", "PATH": "/usr/bin:/bin"},
        timeout=120,
    )
    assert done.returncode == 0 and done.stdout == "cancelled 3, wrong 0\n", done.stdout + done.stderr[-4000:]


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_callers_of_a_scheduler(
    sanitizer: str, bundle_of: Callable[..., Path], request: pytest.FixtureRequest, tmp_path: Path
):
    """Each in a thread of its own, some of whom go, two in texts; sessions are saved where their row is wanted."""
    program = request.getfixturevalue(f"{sanitizer}_driver").parent / "semkv_schedule"
    bundle, callers = bundle_of("semanticache"), [conversation(number, 3, most=4) for number in range(4)]
    leaving: list[dict[str, Any]] = [{"ids": [5, 6, 7], "most": 40, "gone_after": number} for number in range(4)]
    chats = [[{**turn, "session": f"chat {number}"} for turn in CHAT[:2]] for number in range(2)]
    for chat in chats:
        chat[-1]["end"] = True
    given = {"wait_seconds": 120, "save_sessions": str(tmp_path), "genai": libraries()["genai"]}
    found = schedule(program, bundle, [*callers, leaving, [{"ids": [999]}] * 3, *chats], rows=2, **given)
    for turns, replies in zip(callers, found["callers"], strict=False):
        assert [each["ids"] for each in replies] == alone(bundle, turns)
    assert found["statistics"]["cancelled"] == 4 and found["statistics"]["rows_used"] == 0
    texts = [[reply["pieces"] for reply in replies] for replies in found["callers"][-2:]]
    assert texts[0] == texts[1] == [reply["pieces"] for reply in in_python(bundle, CHAT[:2])]


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_a_scheduler_that_shares_its_sessions(
    sanitizer: str, bundle_of: Callable[..., Path], request: pytest.FixtureRequest, tmp_path: Path
):
    """Every turn is written, and read again by a later server."""
    program = request.getfixturevalue(f"{sanitizer}_driver").parent / "semkv_schedule"
    bundle, callers = bundle_of("semanticache"), [conversation(number, 4, most=4) for number in range(3)]
    given: dict[str, Any] = {"rows": 2, "wait_seconds": 120, "save_sessions": str(tmp_path), "share_sessions": True}
    halves = [[turns[half : half + 2] for turns in callers] for half in (0, 2)]
    replies = [schedule(program, bundle, half, **given)["callers"] for half in halves]
    for number, turns in enumerate(callers):
        found = [each for half in replies for each in half[number]]
        assert [each["error"] for each in found] == [""] * 4
        assert [each["ids"] for each in found] == alone(bundle, turns)
