"""A press of kvpress on a transformers model, driven by JSON lines: `python kvpress_worker.py` in any environment.

kvpress wants other versions of transformers than we do, so it may live in an environment of its own. This file imports
nothing of the package. Each line in is a request, each line out its answer, or {"error": …}.

| request | answer |
|---|---|
| open: model, gguf, tokenizer, press, options, threads | backend, kvpress, transformers |
| read: ids, slots (that may stay, mean of all layers' heads) | slots (that stay, sum of all layers' heads) |
| follow: ids, file (for the logits `[n,V]`) | {} |
| generate: ids, count, stop (at the end of a reply) | ids |
"""

from __future__ import annotations

import json
import sys
from typing import Any

EAGER = ("ObservedAttention",)
"""Presses that read attention weights of the whole context, which only eager attention gives."""


class Worker:
    """One press on one model."""

    model: Any = None
    press: Any
    cache: Any

    def open(
        self,
        *,
        model: str,
        gguf: str | None,
        tokenizer: str,
        press: str | None,
        options: dict[str, Any],
        threads: int | None,
    ) -> dict[str, Any]:
        """Makes the press (None: no press, the full cache), and loads the model in float32 the first time."""
        from importlib.metadata import version

        import kvpress
        import torch
        import transformers

        if threads:
            torch.set_num_threads(threads)
        self._torch = torch
        attention = "eager" if press in EAGER else "sdpa"
        if self.model is None:
            self.model = transformers.AutoModelForCausalLM.from_pretrained(
                model, gguf_file=gguf, dtype=torch.float32, local_files_only=True
            ).eval()
            # KVzip looks the tokenizer up under the model's name. Contexts are plain tokens: it must find no template.
            self.model.config.name_or_path = self.model.config._name_or_path = tokenizer
        self.model.set_attn_implementation(attention)
        self.press = None
        if press is not None:
            made = getattr(kvpress, f"{press}Press", None)
            if made is None:
                names = sorted(name[:-5] for name in dir(kvpress) if name.endswith("Press"))
                raise ValueError(f"kvpress has no press {press}; it has {', '.join(names)}")
            self.press = made(compression_ratio=0.5, **options)
        return {
            "backend": f"transformers {attention}, float32",
            "kvpress": version("kvpress"),
            "transformers": version("transformers"),
        }

    def read(self, *, ids: list[int], slots: int) -> dict[str, Any]:
        """Reads a context and compresses it to so many slots at most."""
        import contextlib

        from transformers import DynamicCache

        self.seen = len(ids)
        self.cache = DynamicCache()
        for layer in self.model.model.layers:
            layer.self_attn.masked_key_indices = None
        pressing: Any = contextlib.nullcontext()
        if self.press is not None and slots < len(ids):
            # Presses keep int(n * (1 - ratio)), or drop int(n * ratio): a little off the exact share gives `slots`.
            self.press.compression_ratio = 1 - slots / len(ids) - 1e-9
            pressing = self.press(self.model)
        with self._torch.no_grad(), pressing:
            self.model.model(input_ids=self._torch.tensor([ids]), past_key_values=self.cache)
        self.lengths = [layer.keys.shape[2] for layer in self.cache.layers]
        kept = sum(layer.keys.shape[1] * layer.keys.shape[2] for layer in self.cache.layers)
        for layer in self.model.model.layers:
            masked = getattr(layer.self_attn, "masked_key_indices", None)
            kept -= 0 if masked is None else len(masked[0])
        return {"slots": kept}

    def follow(self, *, ids: list[int], file: str) -> dict[str, Any]:
        """Logits after each of the ids, appended to what was read."""
        import numpy as np

        self._rewind()
        np.save(file, self._append(ids).numpy())
        return {}

    def generate(self, *, ids: list[int], count: int, stop: bool) -> dict[str, Any]:
        """Greedy tokens after the ids."""
        self._rewind()
        given = self.model.generation_config.eos_token_id
        ends = set(given if isinstance(given, list) else [given]) if stop else set()
        generated: list[int] = []
        token = int(self._append(ids)[-1].argmax())
        while token not in ends and len(generated) < count:
            generated.append(token)
            token = int(self._append([token])[-1].argmax())
        return {"ids": generated}

    def _rewind(self) -> None:
        for layer, length in zip(self.cache.layers, self.lengths, strict=True):
            layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]
        self.position = self.seen

    def _append(self, ids: list[int]) -> Any:
        """Logits `[n,V]` of ids that are appended, in one piece or, where the press cannot do that, in halves.

        Presses that drop other slots in each head look for a key that no query attends to, and fail where the queries
        are too many to have one.
        """
        torch = self._torch
        before = [layer.keys.shape[2] for layer in self.cache.layers]
        try:
            with torch.no_grad():
                positions = torch.arange(self.position, self.position + len(ids))[None]
                given = {"input_ids": torch.tensor([ids]), "position_ids": positions}
                logits = self.model(**given, past_key_values=self.cache).logits[0]
        except ValueError:
            if len(ids) == 1:
                raise
            for layer, length in zip(self.cache.layers, before, strict=True):
                layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]
            half = len(ids) // 2
            return torch.cat([self._append(ids[:half]), self._append(ids[half:])])
        self.position += len(ids)
        return logits


def main() -> None:
    """Answers requests until standard input ends. Whatever libraries print goes to standard error."""
    answers, sys.stdout = sys.stdout, sys.stderr
    worker = Worker()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(worker, request.pop("do"))(**request)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
