"""A checkpoint that is not whole is refused by name: what is missing, misshapen, packed, left over or no number."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from semkv_deploy.errors import SemkvError
from semkv_deploy.export.checkpoint import load_checkpoint

Tensors = dict[str, torch.Tensor]


@pytest.fixture()
def changed(tiny_checkpoint: Path, tmp_path: Path) -> Callable[[Callable[[Tensors], Any]], str]:
    """`changed(change)`: the tiny checkpoint with its tensors changed in place by `change`."""

    def make(change: Callable[[Tensors], Any]) -> str:
        from safetensors.torch import load_file, save_file

        folder = tmp_path / "checkpoint"
        shutil.copytree(tiny_checkpoint, folder)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return str(folder)

    return make


def config(folder: str, **values: Any) -> None:
    path = Path(folder) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda t: t.pop("model.norm.weight"),
            r"1 tensor is not in the checkpoint .*got no model\.norm\.weight\)",
        ),
        (
            lambda t: [t.pop(name) for name in list(t) if "layers.0.self_attn" in name],
            r"4 tensors are not in the checkpoint .*k_proj.weight, .*o_proj.weight, .* and 1 more",
        ),
        (lambda t: t.pop("lm_head.weight"), r"got no lm_head\.weight"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(63)}),
            r"1 tensor is not the shape that config\.json says .*model\.norm\.weight",
        ),
        (
            lambda t: t.update({"model.layers.1.mlp.up_proj.bias": torch.ones(128)}),
            r"1 tensor is in the checkpoint, and the model has no place for it .*up_proj\.bias",
        ),
        (
            lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.ones(128, 64)}),
            r"no place for it .*model\.layers\.2\.mlp\.up_proj\.weight",
        ),
        (
            lambda t: t.update({"model.layers.1.mlp.up_proj.weight_scale_inv": torch.ones(1, 1)}),
            r"quantised in a form that would be read as plain numbers .*weight_scale_inv",
        ),
        (
            lambda t: (
                t.update(
                    {
                        "model.layers.0.mlp.up_proj.qweight": torch.zeros(8, 128, dtype=torch.int32),
                        "model.layers.0.mlp.up_proj.scales": torch.ones(1, 128),
                    }
                )
                or t.pop("model.layers.0.mlp.up_proj.weight")
            ),
            r"quantised .*up_proj\.qweight",
        ),
        (
            lambda t: t["model.layers.0.mlp.up_proj.weight"][3, 4:6].fill_(float("nan")),
            r"a weight is not a finite number .*2 of 8192 values NaN or infinite in model\.layers\.0\.mlp\.up_proj",
        ),
        (lambda t: t["model.embed_tokens.weight"][0].fill_(float("inf")), r"64 of 32768 values .*embed_tokens"),
    ],
)
def test_what_is_not_whole_is_named(
    change: Callable[[Tensors], Any], sentence: str, changed: Callable[[Callable[[Tensors], Any]], str]
):
    with pytest.raises(SemkvError, match=sentence):
        load_checkpoint(changed(change))


@pytest.mark.parametrize(
    "extra",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "visual.blocks.0.weight",
        "model.visual.patch_embed.weight",
        "score.weight",
        "mtp.layers.0.weight",
    ],
)
def test_other_models_tensors_are_let_be(extra: str, changed: Callable[[Callable[[Tensors], Any]], str]):
    load_checkpoint(changed(lambda tensors: tensors.update({extra: torch.ones(8)})))


def test_tied_weights_are_not_missing(changed: Callable[[Callable[[Tensors], Any]], str]):
    folder = changed(lambda tensors: tensors.pop("lm_head.weight"))
    config(folder, tie_word_embeddings=True)
    model = load_checkpoint(folder).model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_more_layers_than_weights(changed: Callable[[Callable[[Tensors], Any]], str]):
    folder = changed(lambda tensors: None)
    config(folder, num_hidden_layers=3)
    with pytest.raises(SemkvError, match=r"9 tensors are not in the checkpoint .*model\.layers\.2\."):
        load_checkpoint(folder)


def test_a_checkpoint_in_two_files(tiny_checkpoint: Path, tmp_path: Path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    for file in tiny_checkpoint.glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    assert len(set(json.loads(index.read_text())["weight_map"].values())) > 1
    load_checkpoint(str(tmp_path))

    whole = index.read_text()
    first = sorted(tmp_path.glob("model-*.safetensors"))[0]
    for name, sentence in (
        ("../elsewhere.safetensors", "outside the checkpoint's folder"),
        ("/etc/hostname", "outside the checkpoint's folder"),
        ("a/../../b.safetensors", "outside the checkpoint's folder"),
        ("", "outside the checkpoint's folder"),
        ("absent.safetensors", "a file that is not there"),
    ):
        index.write_text(whole.replace(first.name, name))
        with pytest.raises(SemkvError, match=sentence):
            load_checkpoint(str(tmp_path))
    for text in ("[" * 100_000, "{}", "[]", '{"weight_map": []}', '{"weight_map": {"a": ["b"]}}', "\x00"):
        index.write_text(text)
        with pytest.raises(SemkvError, match="not an index of weights"):
            load_checkpoint(str(tmp_path))
    index.write_text(whole)
    first.unlink()
    with pytest.raises(SemkvError, match="a file that is not there"):
        load_checkpoint(str(tmp_path))


@pytest.mark.parametrize(
    ("file", "sentence"),
    [
        ("adapter_config.json", r"an adapter \(LoRA\).*merge_and_unload"),
        ("decoder.onnx", r"the directory is an export. Give .*decoder\.onnx"),
        ("bundle.json", "already built"),
    ],
)
def test_other_directories(file: str, sentence: str, tmp_path: Path):
    (tmp_path / file).write_text("{}")
    with pytest.raises(SemkvError, match=sentence):
        load_checkpoint(str(tmp_path))


@pytest.mark.parametrize("where", ["tokenizer.json", "config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"[" * 200_000, b"\xff\xfe", b"{}", b"null", b'{"model": {"type": "BPE"}}'])
def test_damaged_json_is_a_sentence(where: str, content: bytes, tiny_checkpoint: Path, tmp_path: Path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, folder)
    (folder / where).write_bytes(content)
    try:
        load_checkpoint(str(folder))
    except SemkvError as error:
        assert str(folder) in str(error) and "\n" not in str(error)


def vocabulary(tiny_checkpoint: Path, folder: Path, tokens: list[str], *, special: bool, template: str = "") -> str:
    from transformers import AutoTokenizer

    shutil.copytree(tiny_checkpoint, folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    tokenizer.add_tokens(tokens, special_tokens=special)
    tokenizer.chat_template += template
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("special", "template", "refused"), [(False, "", True), (True, "", False), (True, "<image>", True)]
)
def test_tokens_that_the_model_does_not_have(
    special: bool, template: str, refused: bool, tiny_checkpoint: Path, tmp_path: Path
):
    """A special token for images, which some models ship, is let be when no chat writes it."""
    from semkv_deploy.export.completeness import check_vocabulary

    source = vocabulary(tiny_checkpoint, tmp_path / "c", ["<image>"], special=special, template=template)
    checkpoint = load_checkpoint(source)
    if not refused:
        check_vocabulary(source, checkpoint.tokenizer, 512, [1])
        return
    with pytest.raises(SemkvError, match=r"tokens that the model does not have .*below 512, got 1 beyond, such as <im"):
        check_vocabulary(source, checkpoint.tokenizer, 512, [1])


def test_integer_codes_are_not_read_as_weights(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """transformers converts them to float without a word: every weight would be its code."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    file = tmp_path / "checkpoint" / "model.safetensors"
    weights = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name] = (weights[name] * 100).to(torch.int8)
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(SemkvError, match=rf"the weights are quantised .*got {name} of I8"):
        load_checkpoint(str(tmp_path / "checkpoint"))
