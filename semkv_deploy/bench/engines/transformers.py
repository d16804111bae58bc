"""transformers with one of its caches, in float32."""

from __future__ import annotations

from typing import Any

from semkv_deploy.bench.engines.base import Rows, SteppingEngine

OPTION = "--transformers"

CACHES = ("DynamicCache", "StaticCache")


class TransformersEngine(SteppingEngine):
    """A model with its own attention.

    Args:
        path: a checkpoint directory, a GGUF file or a hub id.
        cache: one of `CACHES`.
        context: tokens of a row; a StaticCache is as long, and every step reads all of it.

    Raises:
        SemkvError: as `load_checkpoint`.
    """

    memory_shows = True

    def __init__(self, path: str, cache: str, batch: int, threads: int, context: int) -> None:
        import torch

        from semkv_deploy.export.checkpoint import load_checkpoint

        torch.set_num_threads(threads)
        self._torch, self._kind, self._batch, self._context = torch, cache, batch, context
        self._model = load_checkpoint(path).model.eval()
        self.reset()

    def reset(self) -> None:
        import transformers

        of = {"config": self._model.config}
        if self._kind == "StaticCache":
            of["max_cache_len"] = self._context
        self._cache: Any = getattr(transformers, self._kind)(**of)
        self._next: Any = None

    def _append(self, rows: Rows) -> None:
        ids = self._torch.tensor(rows)
        self._run(ids if self._next is None else self._torch.cat([self._next, ids], 1))

    def _step(self) -> None:
        self._run(self._next)

    def _run(self, ids: Any) -> None:
        with self._torch.inference_mode():
            output = self._model(input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._next = output.logits[:, -1:].argmax(-1)

    def facts(self) -> dict[str, Any]:
        tensors = [tensor for layer in self._cache.layers for tensor in (layer.keys, layer.values)]
        cache_mib = sum(tensor.nbytes for tensor in tensors) / (1 << 20)
        return {"live_slots": float(self._cache.get_seq_length()), "cache_mib": cache_mib, "read_mib": cache_mib}

    def about(self) -> dict[str, str]:
        import transformers

        return {"transformers": transformers.__version__, "attention": self._model.config._attn_implementation}
