"""The page says of the contract what the contract is."""

from __future__ import annotations

import contract_tables

from semkv_deploy.bundle.contract import Contract, GraphContract, ProfileContract, ProgramContract, TensorContract
from semkv_deploy.methods.behaviours import (
    Blocks,
    BlockTables,
    IsolatedTurns,
    MakeRoom,
    NexusTurns,
    ReadAgain,
    SlotTables,
)
from semkv_deploy.methods.layout import Binding, Buffer, CacheLayout
from semkv_deploy.model.blocks import DomainWeights
from semkv_deploy.model.cache_groups import CacheGroup

from .blocks import page

MODELS = (
    Contract,
    CacheLayout,
    CacheGroup,
    Buffer,
    ProgramContract,
    Binding,
    GraphContract,
    TensorContract,
    ProfileContract,
    MakeRoom,
    IsolatedTurns,
    ReadAgain,
    NexusTurns,
    Blocks,
    DomainWeights,
    BlockTables,
    SlotTables,
)


def test_tables_are_those_of_the_code():
    text = page("contract.md")
    assert contract_tables.page(text) == text, "run scripts/contract_tables.py"


def test_every_field_is_there_and_has_a_meaning():
    sections = dict(part.split("\n", 1) for part in page("contract.md").split("\n### ")[1:])
    assert list(sections) == [*(model.__name__ for model in MODELS), "Rules"]
    for model in MODELS:
        for name in model.model_fields:
            if name.endswith("_rule"):
                assert f"* **{name}**" in sections["Rules"]
                continue
            (row,) = [line for line in sections[model.__name__].splitlines() if line.startswith(f"| `{name}` |")]
            meaning = row.split(" | ")[-1].strip("| ")
            assert meaning, f"{model.__name__}.{name}"


def test_decoder_has_the_names_that_the_page_gives(tiny_bundle):
    from semkv_deploy.bundle import Bundle

    decoder = Bundle.open(tiny_bundle).built("onnxruntime-cpu", 0.25).contract.decoders[0]
    shapes = {tensor.name: tensor.shape for tensor in decoder.inputs}
    assert shapes["length"] == (2, "batch") and "past_key_values.01.key" in shapes
    assert not {"write_indices", "nonpad_kv_seqlen"} & set(shapes)
