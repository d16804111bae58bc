"""The public methods: presses of NVIDIA's kvpress on the same weights and tokens, at as many bytes as ours keep.

They run in a process of their own, whose Python may be another one's: kvpress 0.5 takes transformers below 5.3.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from semkv_deploy.errors import SemkvError
from semkv_deploy.evaluate import kvpress_worker
from semkv_deploy.evaluate.bundles import slot_bytes
from semkv_deploy.evaluate.entries import PEER, Entry
from semkv_deploy.evaluate.subject import Kept

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from semkv_deploy.model.config import ModelFacts

INSTALL = "make one with: python -m venv kvpress && kvpress/bin/pip install kvpress gguf; give it as --kvpress-python"


class KvpressProcess:
    """The process, with the model that all presses share.

    Args:
        source: a checkpoint folder, GGUF file or hub id: a press works on transformers' model.
        tokenizer: the folder of the model's.
        python: an interpreter that has kvpress; None: this one.

    Raises:
        SemkvError: when the source is an export, or the interpreter cannot be run.
    """

    def __init__(self, source: str, tokenizer: Path, *, python: Path | None, threads: int | None = None) -> None:
        path = Path(source).expanduser()
        if path.suffix == ".onnx":
            raise SemkvError(
                "kvpress works on transformers' model, not on an export",
                where=f"--method {PEER}…",
                fix="give the checkpoint or the GGUF file as SOURCE",
            )
        self.folder = tempfile.TemporaryDirectory()
        is_gguf = path.suffix == ".gguf"
        self._model = {
            "model": str(path.parent if is_gguf else path if path.exists() else source),
            "gguf": path.name if is_gguf else None,
            "tokenizer": str(_without_template(tokenizer, Path(self.folder.name) / "tokenizer")),
            "threads": threads,
        }
        interpreter = str(python) if python is not None else sys.executable
        try:
            self._process = subprocess.Popen(
                # Isolated: beside the worker lies a file that is called kvpress as well.
                [interpreter, "-I", kvpress_worker.__file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        except OSError as error:
            self.folder.cleanup()
            raise SemkvError(f"cannot be run: {error.strerror}", where=f"--kvpress-python {python}") from None

    def press(self, entry: Entry, *, press: bool = True) -> dict[str, Any]:
        """Makes an entry's press the one that requests are for; returns versions and backend."""
        name = entry.name.removeprefix(PEER) if press else None
        return self.ask(entry, "open", press=name, options=dict(entry.options), **self._model)

    def ask(self, entry: Entry, do: str, **request: Any) -> dict[str, Any]:
        """The answer to a request.

        Raises:
            SemkvError: with what kvpress says where it fails.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        answer = json.loads(line) if line else {"error": f"the process ended with code {self._process.wait()}"}
        if "error" in answer:
            missing = "No module named" in answer["error"]
            raise SemkvError(
                f"kvpress fails: {answer['error']}", where=f"--method {entry.text}", fix=INSTALL if missing else None
            )
        assert isinstance(answer, dict)
        return answer

    def close(self) -> None:
        """Ends the process."""
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                assert pipe is not None
                pipe.close()
        self._process.wait()
        self.folder.cleanup()


class KvpressSubject:
    """A press at one budget.

    Args:
        allowed: bytes that may be kept of so many tokens.
        press: False: no press, the full cache of transformers.

    Raises:
        SemkvError: when kvpress has no such press, or does not take the model.
    """

    def __init__(
        self,
        process: KvpressProcess,
        entry: Entry,
        model: ModelFacts,
        allowed: Callable[[int], int],
        *,
        press: bool = True,
    ) -> None:
        self._process, self._entry, self._model, self._allowed = process, entry, model, allowed
        self.backend = str(process.press(entry, press=press)["backend"])

    def _ask(self, do: str, **request: Any) -> dict[str, Any]:
        return self._process.ask(self._entry, do, **request)

    def read(self, turns: Sequence[Sequence[int]]) -> Kept:
        ids = [token for turn in turns for token in turn]
        # Slots of a head, were all alike: what a press makes of them it decides by layer and head.
        slots = min(self._allowed(len(ids)) // slot_bytes(self._model), len(ids))
        kept = self._ask("read", ids=ids, slots=slots)["slots"]
        heads = self._model.layers * self._model.kv_heads
        return Kept(kept * slot_bytes(self._model) // heads, kept / (heads * len(ids)))

    def follow(self, ids: Sequence[int]) -> NDArray[np.float32]:
        file = Path(self._process.folder.name) / "logits.npy"
        self._ask("follow", ids=list(ids), file=str(file))
        logits: NDArray[np.float32] = np.load(file)
        return logits

    def generate(self, ids: Sequence[int], count: int, *, stop: bool = True) -> list[int]:
        generated: list[int] = self._ask("generate", ids=list(ids), count=count, stop=stop)["ids"]
        return generated

    def close(self) -> None:
        """Nothing of its own is held: the model is the process's."""


def _without_template(tokenizer: Path, folder: Path) -> Path:
    """A copy of a tokenizer without its chat template."""
    shutil.copytree(tokenizer, folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    config = folder / "tokenizer_config.json"
    values = json.loads(config.read_text(encoding="utf-8"))
    values.pop("chat_template", None)
    config.write_text(json.dumps(values), encoding="utf-8")
    return folder
