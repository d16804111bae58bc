"""Tiny models as functions of a place, for fixtures and for scripts/fuzz.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

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


def tiny_checkpoint_at(folder: Path, head_dim: int = 16) -> Path:
    """A random Llama of 2 layers, 4 heads over 2 KV heads of 16 (or `head_dim`), vocabulary 512, 512 positions."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        max_position_embeddings=512,
        eos_token_id=1,
        bos_token_id=0,
        # Large enough that greedy choices depend on the context.
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_export_at(checkpoint: Path, out: Path) -> Path:
    """The tiny checkpoint, exported."""
    from semkv_deploy.export import export_model
    from semkv_deploy.methods import SemantiCache

    export_model(str(checkpoint), out, SemantiCache())
    return out


def tiny_adapter_at(export: Path, out: Path, *, k_max: int = 8, turns_max: int = 3, **changes: Any) -> Path:
    """A random SONIC adapter for an exported model, for every linear module of its layers.

    Args:
        changes: fields of the adapter that are to be others than the model's.
    """
    import numpy as np
    import onnx
    from onnx import numpy_helper

    from semkv_deploy.methods.sonic_adapter import MODULES, NEXUS, TURN, SonicAdapter, fingerprint, save_adapter
    from semkv_deploy.model.exported import open_export

    facts, random = open_export(export / "decoder.onnx"), np.random.default_rng(7)
    graph = onnx.load(export / "decoder.onnx").graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    (table,) = (node.input[0] for node in graph.node if node.op_type == "Gather" and node.input[1] == "input_ids")
    embedding = numpy_helper.to_array(weights[table])
    rank, hidden = 4, facts.hidden_size

    def normal(*shape: int) -> Any:
        return (0.3 * random.standard_normal(shape)).astype(np.float32)

    tensors = {NEXUS: normal(k_max, hidden), TURN: normal(turns_max, hidden)}
    for layer in range(facts.layers):
        for module in MODULES:
            part = "self_attn" if module in MODULES[:4] else "mlp"
            inputs, outputs = weights[f"layers.{layer:02d}.{part}.{module}.weight"].dims
            tensors[f"layers.{layer}.{module}.lora_A"] = normal(rank, inputs)
            tensors[f"layers.{layer}.{module}.lora_B"] = normal(outputs, rank)
    given: dict[str, Any] = {
        "tensors": tensors,
        "base": fingerprint(embedding),
        "k_max": k_max,
        "turns_max": turns_max,
        "rank": rank,
        "hidden": hidden,
        "layers": facts.layers,
    }
    save_adapter(out, SonicAdapter(**{**given, **changes}))
    return out


def with_adapter(method: Any, export: Path) -> Any:
    """The method, with a random adapter for an exported model if it is one that is learned."""
    if not method.learned:
        return method
    path = export.parent / f"{export.name}.{method.placement}.safetensors"
    common = tuple(range(500, 100, -3)) if method.placement == "spread" else ()
    adapter = tiny_adapter_at(export, path, placement=method.placement, common=common)
    return type(method).model_validate({**method.model_dump(), "adapter": str(adapter)})


def tiny_bundle_at(export: Path, out: Path) -> Path:
    """Budgets 0.25, 0.5 and 1 of 512 tokens, float32 weights."""
    from semkv_deploy.compiler.pipeline import build_bundle
    from semkv_deploy.methods import SemantiCache

    # Whatever library a developer has installed: tests/native has bundles with it.
    options: Any = {"budgets": [0.25, 0.5, 1.0], "weights": "fp32", "native": "off"}
    build_bundle(str(export / "decoder.onnx"), out, method=SemantiCache(), **options)
    return out


def tiny_gguf_at(
    path: Path,
    without: str = "nothing",
    extra: dict[str, np.ndarray[Any, Any]] | None = None,
    keys: Callable[[Any], Any] = lambda writer: None,
) -> Path:
    """A random Llama of 2 layers and 260 tokens as a GGUF file.

    Args:
        without: tensors whose names have this in them are left out.
        extra: further tensors.
        keys: called with the writer, to add metadata.
    """
    import gguf
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.chat_templates import byte_tokenizer

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=260,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )
    words = [name for name, _ in sorted(byte_tokenizer(None).get_vocab().items(), key=lambda entry: entry[1])]
    words = [*words, "ab", *(f"<extra{i}>" for i in range(259 - len(words)))]

    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e4)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(260)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(words)
    writer.add_token_types([1] * 260)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(257)
    keys(writer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for key, value in model.state_dict().items():
        known = names.get_name(key, try_suffixes=(".weight",))
        if known and without not in known:
            writer.add_tensor(known, value.numpy())
    for key, array in (extra or {}).items():
        writer.add_tensor(key, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
