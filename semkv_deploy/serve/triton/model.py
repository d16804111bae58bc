"""The model that Triton's Python backend runs: requests become turns of one scheduler, pieces become responses.

The backend calls `initialize`, `execute` and `finalize`; `execute` returns at once and responses follow (decoupled), so
turns of all sessions share the engine's rows. Sessions are the scheduler's. Triton's sequence batcher is not used: it
would run two turns of a session at once, and say nothing when a session is idle for too long.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from semkv_deploy.errors import SemkvError
from semkv_deploy.serve.open import open_scheduler
from semkv_deploy.serve.options import ServingOptions
from semkv_deploy.serve.statistics import numbers
from semkv_deploy.serve.triton.inputs import INPUTS, Asked, read
from semkv_deploy.serve.turn import Failed, Finished, Piece, Turn, Unavailable, UnknownSession

LOOK_SECONDS = 0.05
"""Between looks at whether clients have gone."""

_log = logging.getLogger("semkv_deploy.serve.triton")


class TritonPythonModel:
    """One instance: a second one would have sessions of its own, and nothing brings a session back to it."""

    def initialize(self, args: dict[str, str]) -> None:
        """Opens the bundle beside the model, with the parameters of config.pbtxt."""
        import triton_python_backend_utils as triton

        self._triton: Any = triton
        _log_to(triton.Logger)
        config = json.loads(args["model_config"])
        given = {name: each["string_value"] for name, each in config.get("parameters", {}).items()}
        budget, target = float(given.pop("budget")), given.pop("target")
        allow_plugins = given.pop("allow_plugins", "false") == "true"
        bundle = Path(args["model_repository"]) / args["model_version"] / "bundle"
        options = ServingOptions.model_validate(given)
        self._scheduler = open_scheduler(bundle, options, budget=budget, target=target, allow_plugins=allow_plugins)
        self._scheduler.start()
        self._metrics = _Metrics(triton, {"model": config["name"], "version": args["model_version"]})
        self._open: dict[Turn, Any] = {}
        self._changed, self._ending = threading.Lock(), threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="watcher", daemon=True)
        self._watcher.start()

    def execute(self, requests: list[Any]) -> None:
        """Puts the turns that are asked for before the scheduler; their responses come from its thread."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._begin(request, sender)
            except Exception as error:
                self._send_error(sender, error)

    def finalize(self) -> None:
        """Breaks off what runs, and saves sessions where that was asked for."""
        self._ending.set()
        self._watcher.join()
        self._scheduler.close()
        self._metrics.update(self._scheduler)

    def _begin(self, request: Any, sender: Any) -> None:
        arrays = {each.name: self._triton.get_input_tensor_by_name(request, each.name) for each in INPUTS}
        asked = read(
            {name: tensor.as_numpy() for name, tensor in arrays.items() if tensor is not None},
            request.correlation_id(),
            request.flags(),
            has_template=self._scheduler.form is not None,
            max_tokens=self._scheduler.max_new_tokens,
        )
        if asked.request is None:
            assert asked.session is not None
            self._scheduler.end_session(asked.session)
            self._send(sender, [], "", Finished("stop", "ended"), "ended")
            return
        turn = self._scheduler.submit(asked.session, asked.request, self._listener(asked, sender))
        with self._changed:
            self._open[turn] = sender

    def _listener(self, asked: Asked, sender: Any) -> Callable[[Piece | Finished], None]:
        ids: list[int] = []
        text: list[str] = []

        def heard(event: Piece | Finished) -> None:
            if isinstance(event, Finished):
                self._end(sender, ids, "".join(text), event)
                return
            ids.extend(event.ids)
            text.append(event.text)
            if asked.stream:
                self._send(sender, ids, "".join(text))
                ids.clear()
                text.clear()

        return heard

    def _end(self, sender: Any, ids: list[int], text: str, end: Finished) -> None:
        if end.error is not None:
            self._send_error(sender, end.error)
        elif end.reason == "cancelled":
            self._send_error(sender, None)
        else:
            self._send(sender, ids, text, end, end.reason)

    def _send(self, sender: Any, ids: list[int], text: str, end: Finished | None = None, reason: str = "") -> None:
        tensor = self._triton.Tensor
        tensors = [
            tensor("output_ids", np.array(ids, np.int64)),
            tensor("text_output", np.array([text.encode()], np.object_)),
        ]
        if end is not None:
            tensors += [
                tensor("finish_reason", np.array([reason.encode()], np.object_)),
                tensor("prompt_tokens", np.array([end.prompt_tokens], np.int64)),
                tensor("cached_tokens", np.array([end.cached_tokens], np.int64)),
            ]
        flags = 0 if end is None else self._triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL
        sender.send(self._triton.InferenceResponse(output_tensors=tensors), flags)

    def _send_error(self, sender: Any, error: Exception | None) -> None:
        """Ends a request with an error; None: it was cancelled."""
        kind = self._triton.TritonError
        what = "cancelled" if error is None else str(error)
        response = self._triton.InferenceResponse(output_tensors=[], error=kind(what, _code(kind, error)))
        sender.send(response, self._triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _watch(self) -> None:
        """Looks around until the end, whatever a look meets: without it no client's leaving would be seen again."""
        while not self._ending.wait(LOOK_SECONDS):
            try:
                self._look()
            except Exception:
                _log.exception("a look at clients and metrics failed")

    def _look(self) -> None:
        """Breaks off turns whose clients have gone, and keeps Triton's metrics."""
        with self._changed:
            turns = list(self._open.items())
        for turn, sender in turns:
            if turn.finished is not None:
                with self._changed:
                    del self._open[turn]
            elif _has_gone(sender):
                turn.cancel()
        self._metrics.update(self._scheduler)


def _has_gone(sender: Any) -> bool:
    """Whether a request's client has gone. Of a request that Triton is through with it may not be asked any more."""
    try:
        return bool(sender.is_cancelled())
    except Exception as error:
        _log.warning("whether a client has gone is not known: %s", error)
        return False


def _code(kind: Any, error: Exception | None) -> Any:
    """Triton's code of an error; None: it was cancelled."""
    if error is None:
        return kind.CANCELLED
    # The first that it is an instance of.
    codes = (
        (Unavailable, kind.UNAVAILABLE),
        (UnknownSession, kind.NOT_FOUND),
        (Failed, kind.INTERNAL),
        (SemkvError, kind.INVALID_ARG),
        (Exception, kind.INTERNAL),
    )
    return next(code for each, code in codes if isinstance(error, each))


class _Metrics:
    """The scheduler's numbers as Triton's custom metrics."""

    def __init__(self, triton: Any, labels: dict[str, str]) -> None:
        self._triton, self._labels = triton, labels
        self._metrics: dict[str, Any] = {}
        self._families: list[Any] = []

    def update(self, scheduler: Any) -> None:
        """Gives Triton the numbers as they are now."""
        for name, kind, value in numbers(scheduler.statistics, scheduler.held()):
            if name not in self._metrics:
                of = self._triton.MetricFamily
                family = of(name=name, description=name, kind=of.COUNTER if kind == "counter" else of.GAUGE)
                self._families.append(family)
                self._metrics[name] = family.Metric(labels=self._labels)
            metric = self._metrics[name]
            if kind == "gauge":
                metric.set(value)
            elif value > metric.value():
                metric.increment(value - metric.value())


def _log_to(logger: Any) -> None:
    """Sends what the scheduler logs to Triton's log."""

    class _Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            log = logger.log_error if record.levelno >= logging.ERROR else logger.log_warn
            log(self.format(record))

    package = logging.getLogger("semkv_deploy")
    if not package.handlers:
        package.addHandler(_Handler(logging.WARNING))
