"""onnxruntime-genai with its full cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from semkv_deploy.bench.engines.base import Rows, SteppingEngine, require_package, require_vocabulary
from semkv_deploy.errors import SemkvError

OPTION = "--genai"
_BUILD = "make one with: python -m onnxruntime_genai.models.builder -i <checkpoint> -o <dir> -p int4 -e cpu"


def check(path: Path, vocabulary: int) -> None:
    """Fails unless the package is installed and the directory has a model of it that takes the tokens.

    Args:
        vocabulary: entries that it must have at least.

    Raises:
        SemkvError: with what is missing.
    """
    if not (path / "genai_config.json").is_file():
        raise SemkvError("not an onnxruntime-genai model", where=f"{OPTION} {path}", fix=_BUILD)
    require_package("onnxruntime_genai", OPTION)
    require_vocabulary(int(_model_facts(path)["vocab_size"]), vocabulary, f"{OPTION} {path}")


def _model_facts(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads((path / "genai_config.json").read_text(encoding="utf-8"))["model"]
        return {**facts, "decoder": dict(facts["decoder"]), "vocab_size": facts["vocab_size"]}
    except (ValueError, KeyError, TypeError) as error:
        raise SemkvError(f"cannot be read: {error!r}", where=f"{OPTION} {path / 'genai_config.json'}") from None


class GenaiEngine(SteppingEngine):
    """A generator, which prefills a prompt in one piece, into a cache that is allocated for the whole context.

    Its calls hold the interpreter's lock, so that no memory can be sampled while they run.

    Args:
        path: the model's directory.
        context: tokens of a row.
    """

    def __init__(self, path: str, batch: int, threads: int, context: int) -> None:
        import onnxruntime_genai as og

        self._og, self._batch, root = og, batch, Path(path)
        self._facts = _model_facts(root)
        config = og.Config(path)
        # One more than the context: the token that is chosen last is counted, and never appended. So no token has a
        # position that the model has not.
        self._length = context + 1
        decoder = {"session_options": {"intra_op_num_threads": threads}}
        longest = max(self._length, int(self._facts["context_length"]))
        config.overlay(json.dumps({"model": {"context_length": longest, "decoder": decoder}}))
        self._model = og.Model(config)
        self._cache_bytes = np.dtype(cache_type(root)).itemsize
        self.reset()

    def reset(self) -> None:
        parameters = self._og.GeneratorParams(self._model)
        # min_length: the end of a reply ends no measurement.
        parameters.set_search_options(
            max_length=self._length, min_length=self._length, batch_size=self._batch, do_sample=False
        )
        self._generator: Any = self._og.Generator(self._model, parameters)

    def _append(self, rows: Rows) -> None:
        given, seen = np.array(rows, np.int32), self._generator.token_count()
        if seen:
            # 0.18 goes on otherwise than from the same tokens in one piece when others are appended behind a token
            # that it chose: take that one back, and append it with them.
            last = [self._generator.get_sequence(row)[-1:] for row in range(self._batch)]
            self._generator.rewind_to(seen - 1)
            given = np.concatenate([np.array(last, np.int32), given], 1)
        self._generator.append_tokens(given)
        self._generator.generate_next_token()  # no run of the model: chooses by the prompt's logits

    def _step(self) -> None:
        if self._generator.is_done():
            raise SemkvError(
                "the model takes no more tokens", where=OPTION, expected=f"at most {self._length}",
                fix="measure a smaller --context",
            )  # fmt: skip
        self._generator.generate_next_token()

    def facts(self) -> dict[str, Any]:
        decoder = self._facts["decoder"]
        slot = 2 * decoder["num_hidden_layers"] * decoder["num_key_value_heads"] * decoder["head_size"]
        slot_mib = self._batch * slot * self._cache_bytes / (1 << 20)
        live = len(self._generator.get_sequence(0)) - 1
        return {"live_slots": float(live), "cache_mib": self._length * slot_mib, "read_mib": live * slot_mib}

    def about(self) -> dict[str, str]:
        return {"onnxruntime-genai": self._og.__version__}


def cache_type(path: Path) -> str:
    """Type of the caches that the model's decoder takes, as numpy calls it.

    Raises:
        SemkvError: when it takes none.
    """
    import onnx

    name = _model_facts(path)["decoder"]["filename"]
    graph = onnx.load(path / name, load_external_data=False).graph
    caches = [value for value in graph.input if value.name.startswith("past_key_values")]
    if not caches:
        raise SemkvError("no caches among its inputs", where=f"{OPTION} {path / name}", expected="past_key_values.…")
    return str(onnx.helper.tensor_dtype_to_np_dtype(caches[0].type.tensor_type.elem_type))
