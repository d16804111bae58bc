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


class KvpressSubject:
    """A press in its process.

    Args:
        source: a checkpoint folder or GGUF file: a press works on transformers' model.
        tokenizer: the folder of the model's.
        python: an interpreter that has kvpress; None: this one.
        allowed: bytes that may be kept of so many tokens.
        press: None: no press, the full cache of transformers.

    Raises:
        SemkvError: when there is no kvpress, or it has no such press, or does not take the model.
    """

    def __init__(
        self,
        entry: Entry,
        model: ModelFacts,
        *,
        source: str,
        tokenizer: Path,
        python: Path | None,
        allowed: Callable[[int], int],
        threads: int | None = None,
        press: bool = True,
    ) -> None:
        self._entry, self._model, self._allowed = entry, model, allowed
        path = Path(source).expanduser()
        if path.suffix == ".onnx":
            raise SemkvError(
                "kvpress works on transformers' model, not on an export",
                where=f"--method {entry.text}",
                fix="give the checkpoint or the GGUF file as SOURCE",
            )
        self._folder = tempfile.TemporaryDirectory()
        interpreter = str(python) if python is not None else sys.executable
        try:
            self._process = subprocess.Popen(
                [interpreter, kvpress_worker.__file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        except OSError as error:
            raise SemkvError(f"cannot be run: {error.strerror}", where=f"--kvpress-python {python}") from None
        is_gguf = path.suffix == ".gguf"
        try:
            self.versions = self._ask(
                "open",
                model=str(path.parent if is_gguf else source),
                gguf=path.name if is_gguf else None,
                tokenizer=str(_without_template(tokenizer, Path(self._folder.name) / "tokenizer")),
                press=entry.name.removeprefix(PEER) if press else None,
                options=dict(entry.options),
                threads=threads,
            )
        except BaseException:
            self.close()
            raise
        self.backend = str(self.versions["backend"])

    def _ask(self, do: str, **request: Any) -> dict[str, Any]:
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
                f"kvpress fails: {answer['error']}",
                where=f"--method {self._entry.text}",
                fix=INSTALL if missing else None,
            )
        assert isinstance(answer, dict)
        return answer

    def read(self, turns: Sequence[Sequence[int]]) -> Kept:
        ids = [token for turn in turns for token in turn]
        # Slots of a head, were all alike: what a press makes of them it decides by layer and head.
        slots = min(self._allowed(len(ids)) // slot_bytes(self._model), len(ids))
        kept = self._ask("read", ids=ids, slots=slots)["slots"]
        heads = self._model.layers * self._model.kv_heads
        return Kept(kept * slot_bytes(self._model) // heads, kept / (heads * len(ids)))

    def follow(self, ids: Sequence[int]) -> NDArray[np.float32]:
        file = Path(self._folder.name) / "logits.npy"
        self._ask("follow", ids=list(ids), file=str(file))
        logits: NDArray[np.float32] = np.load(file)
        return logits

    def generate(self, ids: Sequence[int], count: int) -> list[int]:
        generated: list[int] = self._ask("generate", ids=list(ids), count=count)["ids"]
        return generated

    def close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                assert pipe is not None
                pipe.close()
        self._process.wait()
        self._folder.cleanup()


def _without_template(tokenizer: Path, folder: Path) -> Path:
    """A copy of a tokenizer without its chat template."""
    shutil.copytree(tokenizer, folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    config = folder / "tokenizer_config.json"
    values = json.loads(config.read_text(encoding="utf-8"))
    values.pop("chat_template", None)
    config.write_text(json.dumps(values), encoding="utf-8")
    return folder
