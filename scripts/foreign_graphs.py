"""A checkpoint's decoder as other exporters write it: genai's builder, torch.onnx of a DynamicCache, optimum."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel


class WithCache(torch.nn.Module):
    """A decoder whose cache goes in and out as tensors, keys and values of every layer in turn."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any, *past: Any) -> tuple[Any, ...]:
        cache = DynamicCache()
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        out = self.model(**given, past_key_values=cache, use_cache=True)
        return (out.logits, *(tensor for layer in cache.layers for tensor in (layer.keys, layer.values)))


class WithMask(WithCache):
    """The same, and its mask in tensor operations: what transformers makes of one cannot be traced by TorchScript."""

    def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any, *past: Any) -> tuple[Any, ...]:
        slots, rows = attention_mask.shape[1], input_ids.shape[1]
        causal = torch.arange(slots)[None] <= (slots - rows + torch.arange(rows))[:, None]
        seen = causal[None, None] & attention_mask[:, None, None].to(torch.bool)
        mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
        return super().forward(input_ids, mask, position_ids, *past)


class Counting(WithCache):
    """The same, its positions counted by the length of its cache."""

    def forward(self, input_ids: Any, attention_mask: Any, *past: Any) -> tuple[Any, ...]:
        return super().forward(input_ids, attention_mask, None, *past)


def by_torch(
    model: PreTrainedModel,
    tokenizer: Any,
    folder: Path,
    opset: int = 20,
    script: bool = False,
    positions: bool = True,
) -> Path:
    """Writes model.onnx, config.json and a tokenizer; `Attention` from opset 23 on, where the model attends by sdpa.

    Args:
        script: by TorchScript, which writes old opsets too.
        positions: with an input for them; only without `script` they can be left out.
    """
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    batch, rows, slots = 2, 3, 5
    past = [torch.zeros(batch, heads, slots, size, dtype=model.dtype) for _ in range(2 * config.num_hidden_layers)]
    names = [f"{layer}.{kind}" for layer in range(config.num_hidden_layers) for kind in ("key", "value")]
    ids = torch.zeros(batch, rows, dtype=torch.long)
    mask, places = torch.ones(batch, slots + rows, dtype=torch.long), torch.arange(slots, slots + rows).repeat(2, 1)
    of_tokens = {"input_ids": ids, "attention_mask": mask, **({"position_ids": places} if positions else {})}
    inputs = [*of_tokens, *(f"past_key_values.{name}" for name in names)]
    outputs = ["logits", *(f"present.{name}" for name in names)]
    given = (*of_tokens.values(), *past)
    path = folder / "model.onnx"
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if script:
            second = {"input_ids": "rows", "attention_mask": "slots", "position_ids": "rows"}
            rows_free = {name: {0: "batch", 1: size} for name, size in second.items()}
            past_free = {name: {0: "batch", 2: "past"} for name in inputs[3:]}
            torch.onnx.export(
                WithMask(model),
                given,
                str(path),
                dynamo=False,
                dynamic_axes=rows_free | past_free,
                input_names=inputs,
                output_names=outputs,
                opset_version=opset,
            )
        else:
            free = torch.export.Dim.AUTO
            program = torch.onnx.export(
                WithCache(model) if positions else Counting(model),
                given,
                dynamo=True,
                dynamic_shapes=(*[{0: free, 1: free}] * len(of_tokens), tuple({0: free, 2: free} for _ in past)),
                input_names=inputs,
                output_names=outputs,
                opset_version=opset,
                verbose=False,
            )
            assert program is not None
            program.save(str(path), external_data=True)
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return path


@contextmanager
def saved(model: PreTrainedModel, tokenizer: Any) -> Iterator[Path]:
    """The model in Hugging Face form, in a folder that is gone after the block."""
    # Dequantised GGUF weights are ordinary weights, but transformers remembers where they came from and refuses.
    for owner, name in ((model, "hf_quantizer"), (model, "quantization_method"), (model.config, "quantization_config")):
        if hasattr(owner, name):
            delattr(owner, name)
    model.is_quantized = False  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        yield Path(folder)


def by_genai(
    model: PreTrainedModel, tokenizer: Any, folder: Path, precision: str, provider: str = "cpu", **options: Any
) -> Path:
    """Writes a model directory of onnxruntime-genai.

    Args:
        precision: fp32, fp16, int4 or int8.
        provider: cpu, or another whose graph is wanted; nothing of it is asked for.
        options: the builder's `--extra_options`.
    """
    more = ["--extra_options", *(f"{name}={value}" for name, value in options.items())] if options else []
    with saved(model, tokenizer) as source:
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(source), "-o", str(folder)]
        command += ["-p", precision, "-e", provider, "-c", str(source), *more]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder / "model.onnx"


def by_optimum(model: PreTrainedModel, tokenizer: Any, folder: Path, python: str) -> Path:
    """Writes what optimum-onnx does.

    Args:
        python: that has it: it takes transformers below 5.
    """
    with saved(model, tokenizer) as source:
        path = source / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        # Where transformers below 5 looks for it.
        config |= {name: config["rope_parameters"][name] for name in ("rope_theta",) if "rope_parameters" in config}
        path.write_text(json.dumps(config), encoding="utf-8")
        command = [python, "-m", "optimum.exporters.onnx", "--task", "text-generation-with-past"]
        subprocess.run([*command, "--model", str(source), str(folder)], check=True, stdout=subprocess.DEVNULL)
    tokenizer.save_pretrained(folder)
    return folder / "model.onnx"
