"""The part of Triton's `triton_python_backend_utils` that the model uses, as strict as the real one about types."""

from __future__ import annotations

import enum
import threading
from typing import Any, ClassVar

import numpy as np

TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1


class Code(enum.Enum):
    UNAVAILABLE = "unavailable"
    NOT_FOUND = "not found"
    INTERNAL = "internal"
    INVALID_ARG = "invalid argument"
    CANCELLED = "cancelled"


class TritonError:
    UNAVAILABLE, NOT_FOUND, INTERNAL = Code.UNAVAILABLE, Code.NOT_FOUND, Code.INTERNAL
    INVALID_ARG, CANCELLED = Code.INVALID_ARG, Code.CANCELLED

    def __init__(self, message: str, code: Code) -> None:
        # The real one's is an enumeration, and takes no number for it.
        assert isinstance(message, str) and isinstance(code, Code)
        self.message, self.code = message, code


class Tensor:
    def __init__(self, name: str, array: np.ndarray) -> None:
        assert array.dtype in (np.int64, np.object_)
        self.name, self._array = name, array

    def as_numpy(self) -> np.ndarray:
        return self._array


class InferenceResponse:
    def __init__(self, output_tensors: list[Tensor], error: TritonError | None = None) -> None:
        self.outputs = {tensor.name: tensor.as_numpy().tolist() for tensor in output_tensors}
        self.error = error


class Sender:
    def __init__(self) -> None:
        self.responses: list[InferenceResponse] = []
        self.ended = threading.Event()
        self.cancelled = False

    def send(self, response: InferenceResponse, flags: int) -> None:
        assert not self.ended.is_set(), "nothing follows the final response"
        self.responses.append(response)
        if flags & TRITONSERVER_RESPONSE_COMPLETE_FINAL:
            self.ended.set()

    def is_cancelled(self) -> bool:
        return self.cancelled

    @property
    def ids(self) -> list[int]:
        return [token for each in self.responses for token in each.outputs.get("output_ids", [])]

    @property
    def text(self) -> str:
        return b"".join(each.outputs["text_output"][0] for each in self.responses).decode()

    @property
    def error(self) -> TritonError:
        error = self.responses[-1].error
        assert error is not None
        return error


TYPES: dict[str, Any] = {
    "max_tokens": np.int32,
    "temperature": np.float32,
    "top_p": np.float32,
    "top_k": np.int32,
    "seed": np.uint64,
    "input_ids": np.int64,
    "stop_ids": np.int64,
}


class Request:
    """A request whose inputs are given as Python values."""

    def __init__(self, correlation_id: int | str = 0, flags: int = 0, **inputs: Any) -> None:
        self._correlation_id, self._flags, self.sender = correlation_id, flags, Sender()
        self.inputs = {name: Given(array(name, value)) for name, value in inputs.items()}

    def get_response_sender(self) -> Sender:
        return self.sender

    def correlation_id(self) -> int | str:
        return self._correlation_id

    def flags(self) -> int:
        return self._flags


class Given:
    def __init__(self, value: np.ndarray) -> None:
        self._array = value

    def as_numpy(self) -> np.ndarray:
        return self._array


def array(name: str, value: Any) -> np.ndarray:
    """An input as Triton gives it: strings as bytes in an array of objects."""
    values = value if isinstance(value, list) else [value]
    if values and isinstance(values[0], (str, bytes)):
        return np.array([each.encode() if isinstance(each, str) else each for each in values], np.object_)
    return np.array(values, bool if values and isinstance(values[0], bool) else TYPES[name])


def get_input_tensor_by_name(request: Request, name: str) -> Given | None:
    return request.inputs.get(name)


class Logger:
    lines: ClassVar[list[str]] = []

    @classmethod
    def log_warn(cls, text: str) -> None:
        cls.lines.append(text)

    log_error = log_warn


class MetricFamily:
    COUNTER, GAUGE = "counter", "gauge"
    metrics: ClassVar[dict[str, Metric]] = {}

    def __init__(self, name: str, description: str, kind: str) -> None:
        self._name, self._kind = name, kind

    def Metric(self, labels: dict[str, str]) -> Metric:
        metric = self.metrics[self._name] = Metric(self._kind)
        return metric


class Metric:
    def __init__(self, kind: str) -> None:
        self._kind, self._value = kind, 0.0

    def value(self) -> float:
        return self._value

    def set(self, value: float) -> None:
        assert self._kind == MetricFamily.GAUGE
        self._value = value

    def increment(self, value: float) -> None:
        assert value >= 0
        self._value += value
