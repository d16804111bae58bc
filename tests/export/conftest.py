"""Tiny decoders of every family, and a conversation to run through a model, its reference and its ONNX graph."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

VOCABULARY = 97

Run = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
"""The decoder graph's inputs by name -> its outputs by name."""


@dataclass(frozen=True)
class Family:
    """A tiny configuration and what its export must show: windows per layer, soft cap, rotary (dim, interleaved).

    Families whose layers are all alike have one, because tracing takes seconds a layer.
    """

    config: dict[str, Any] = field(default_factory=dict)
    windows: tuple[int, ...] = (0,)
    softcap: float = 0.0
    rotary: tuple[int, bool] | None = (8, False)


FAMILIES: dict[str, Family] = {
    "llama": Family(
        {
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
        windows=(0, 0),
    ),
    "qwen2": Family({"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}, windows=(0, 5)),
    "qwen3": Family({"head_dim": 16}, rotary=(16, False)),
    "mistral": Family({"sliding_window": 6}, windows=(6,)),
    "gemma": Family({"head_dim": 16}, rotary=(16, False)),
    "gemma2": Family(
        {
            "head_dim": 16,
            "sliding_window": 6,
            "query_pre_attn_scalar": 8,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 4.0,
        },
        windows=(6, 0),
        softcap=5.0,
        rotary=(16, False),
    ),
    "gemma3_text": Family(
        {"head_dim": 16, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
        windows=(6, 0),
        rotary=None,
    ),
    "phi": Family({"partial_rotary_factor": 0.5}, rotary=(4, False)),
    "phi3": Family({"sliding_window": 7}, windows=(7,)),
}


def _build(model_type: str, **overrides: Any) -> PreTrainedModel:
    """A random decoder of 2 layers, 4 heads over 2 KV heads of 8; norms and biases too are random."""
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.2,
    } | overrides
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small only wait for each other's threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def families() -> dict[str, Family]:
    return FAMILIES


@pytest.fixture(scope="session")
def build_model() -> Callable[..., PreTrainedModel]:
    """`build_model(model_type, **config)`: a tiny random decoder."""
    return _build


@dataclass
class Conversation:
    """Token ids of two rows, of which `lengths` tokens are prefilled together (the shorter one padded) and `steps`
    more decoded one by one; row r must behave as if it were alone."""

    tokens: Tensor
    lengths: tuple[int, int] = (15, 9)
    steps: int = 5

    def play(self, run: Run, caches: dict[str, Tensor], layers: int) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Logits of each row's tokens `[lengths[r] + steps, vocabulary]`, and the caches afterwards by input name."""
        rows = len(self.lengths)
        count = torch.tensor(self.lengths)
        position = torch.zeros(rows, dtype=torch.int64)
        length = torch.zeros(layers, rows, dtype=torch.int64)
        prompt = torch.zeros(rows, max(self.lengths), dtype=torch.int64)
        for row, own in enumerate(self.lengths):
            prompt[row, :own] = self.tokens[row, :own]
        next_tokens = [
            torch.stack([self.tokens[row, own + step] for row, own in enumerate(self.lengths)])[:, None]
            for step in range(self.steps)
        ]
        logits: list[list[Tensor]] = [[] for _ in range(rows)]
        for number, chunk in enumerate([prompt, *next_tokens]):
            appended = count if number == 0 else torch.ones_like(count)
            width = torch.arange(chunk.shape[1])
            outputs = run(
                {
                    **caches,
                    "input_ids": chunk,
                    "position_ids": position[:, None] + width,
                    "logits_index": width.repeat(rows, 1),
                    "length": length,
                }
            )
            for layer in range(layers):
                for kind in ("key", "value"):
                    caches[f"past_key_values.{layer:02d}.{kind}"] = outputs[f"present.{layer:02d}.{kind}"]
            for row in range(rows):
                logits[row].append(outputs["logits"][row, : appended[row]])
            position, length = position + appended, length + appended
        return [torch.cat(parts) for parts in logits], caches

    def plain(self, model: PreTrainedModel, row: int) -> tuple[Tensor, DynamicCache]:
        """One row alone through transformers with its own attention and cache: logits, and the cache."""
        own, tokens = self.lengths[row], self.tokens[row : row + 1]
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            logits = [model(tokens[:, :own], past_key_values=cache).logits[0]]
            for at in range(own, own + self.steps):
                position = torch.tensor([[at]])
                step = model(tokens[:, at : at + 1], past_key_values=cache, position_ids=position)
                logits.append(step.logits[0])
        return torch.cat(logits), cache


@pytest.fixture(scope="session")
def conversation() -> Conversation:
    generator = torch.Generator().manual_seed(7)
    return Conversation(torch.randint(3, VOCABULARY, (2, 24), generator=generator))


def _open(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        outputs = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
        return dict(zip(names, map(torch.from_numpy, outputs), strict=True))

    return run


@pytest.fixture(scope="session")
def open_onnx() -> Callable[[Path], Run]:
    """Opens a decoder in ONNX Runtime, the operator running as the model's own function."""
    return _open


@dataclass(frozen=True)
class Exported:
    """A family's tiny model and its decoder graph on disk."""

    model: PreTrainedModel
    path: Path


@pytest.fixture(scope="session")
def exported_family(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Exported]:
    """`exported_family(name, **config)`: exported when first asked for, for seconds are spent on each."""
    from semkv_deploy.export.decoder import export_decoder
    from semkv_deploy.graph.files import write_model

    @functools.cache
    def export(name: str, **overrides: Any) -> Exported:
        settings = {"num_hidden_layers": len(FAMILIES[name].windows), **FAMILIES[name].config, **overrides}
        model = _build(name, **settings)
        path = tmp_path_factory.mktemp(name) / "decoder.onnx"
        write_model(export_decoder(model), path)
        return Exported(model, path)

    return export


@dataclass(frozen=True)
class LoadedGguf:
    """A checkpoint loaded from `path`, and how often the file was parsed for it."""

    path: Path
    checkpoint: Any
    reads: int


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf: Path) -> LoadedGguf:
    """SmolLM2-135M-Instruct, a Q4_1 GGUF."""
    import gguf

    from semkv_deploy.export.checkpoint import load_checkpoint

    reader, reads = gguf.GGUFReader, 0

    class Counting(reader):  # type: ignore[misc, valid-type]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            nonlocal reads
            reads += 1
            super().__init__(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFReader", Counting)
        checkpoint = load_checkpoint(str(smollm2_gguf))
        assert gguf.GGUFReader is Counting
    return LoadedGguf(smollm2_gguf, checkpoint, reads)
