"""libsemkv_text: ids and texts are those of Python's tokenizer, template and stream; what cannot be is said."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import random
import shutil
import subprocess
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from semkv_deploy import load_tokenizer
from semkv_deploy.compiler.calibrate import calibration_text
from semkv_deploy.model.template import ChatTemplate
from semkv_deploy.runtime.conversation import ChatFormat, Conversation
from semkv_deploy.runtime.reply import Reply
from semkv_deploy.runtime.tokens import TextStream
from tests.tiny import CHAT_TEMPLATE

from .driver import CppError, Driver, onnxruntime_library

TEXTS = [
    "",
    "Hello world",
    "  two  spaces\n\n\tand a tab ",
    "ä ö ü ß e\u0301 é ﬁ ½ Ⅷ",
    "漢字かな交じり文",
    "👩\u200d👩\u200d👧\u200d👦 and 🇩🇪",
    "नमस्ते दुनिया, مرحبا بالعالم",
    "<|im_start|>user\nHi<|im_end|>\n x <|im_end|> y",
    "def f(x):\n    return x**2  # 3.14\r\n",
    "don't we'll I'M 1234567890",
    "\ufffd \u200b \u00a0 \u2028",
    "a" * 300,
]
PARTS = ["a", " ", "  ", "\n", "é", "漢", "👍", "1", "'s", "<|im_end|>", "Z_", "-", "\u0301", "…", "🇩🇪"]

# What splits a text before byte-level BPE, in tokenizer.json of Qwen 2 and 3, Llama 3 and GPT-4o.
WORDS, ENDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"|\s*[\r\n]+|\s+(?!\S)|\s+"
BEFORE, UPPER, LOWER = r"[^\r\n\p{L}\p{N}]?", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
SPLITS = {
    "qwen": rf"{WORDS}|{BEFORE}\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*{ENDS}",
    "llama3": rf"{WORDS}|{BEFORE}\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*{ENDS}",
    "gpt-4o": rf"{BEFORE}{UPPER}*{LOWER}+{WORDS}?|{BEFORE}{UPPER}+{LOWER}*{WORDS}?|\p{{N}}{{1,3}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{ENDS}",
}


def trained(split: str, out: Path) -> Path:
    """A small tokenizer with a family's steps, saved: Qwen's normalizes, Llama's would begin a text with a token."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special, before = ["<|im_start|>", "<|im_end|>"], pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made = Tokenizer(models.BPE(ignore_merges=split == "llama3"))
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLITS[split]), "isolated"), before])
    made.decoder = decoders.ByteLevel()
    if split == "qwen":
        made.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([calibration_text()], trainer)
    if split == "llama3":
        start = [(special[0], 0)]
        made.post_processor = processors.TemplateProcessing(single=f"{special[0]} $A", special_tokens=start)
    fast = PreTrainedTokenizerFast(tokenizer_object=made, bos_token=special[0], eos_token=special[1])
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(out)
    return out


def texts() -> list[str]:
    draw = random.Random(1)
    return [calibration_text()[:5000], *TEXTS] + [
        "".join(draw.choices(PARTS, k=draw.randint(1, 30))) for _ in range(100)
    ]


def libraries() -> dict[str, str]:
    """Of onnxruntime and onnxruntime-genai in this environment."""
    # Not imported: that sets ORT_LIB_PATH for every process that begins here.
    found = importlib.util.find_spec("onnxruntime_genai")
    if found is None or found.origin is None:
        pytest.skip("no onnxruntime-genai: texts are not tested")
    return {"onnxruntime": onnxruntime_library(), "genai": str(Path(found.origin).parent / "libonnxruntime-genai.so")}


def with_tokenizer(bundle: Path, tokenizer: Path, out: Path) -> Path:
    """A copy of a bundle that has another tokenizer."""
    shutil.copytree(bundle, out, ignore=lambda folder, names: ["tokenizer"] if Path(folder) == bundle else [])
    shutil.copytree(tokenizer, out / "tokenizer")
    manifest = json.loads((out / "bundle.json").read_text(encoding="utf-8"))
    files = {name: record for name, record in manifest["files"].items() if not name.startswith("tokenizer/")}
    for path in sorted((out / "tokenizer").iterdir()):
        content = path.read_bytes()
        files[f"tokenizer/{path.name}"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest["files"] = files
    (out / "bundle.json").write_text(json.dumps(manifest), encoding="utf-8")
    return out


class Side:
    """One bundle's texts, in C++ and in Python."""

    def __init__(self, cpp: Driver, bundle: Path) -> None:
        self.cpp, self.bundle, self.tokenizer = cpp, bundle, load_tokenizer(bundle)
        cpp("open", bundle=str(bundle), **libraries())

    def texts(self) -> list[str]:
        """Those that are taken: a tokenizer that normalizes wants them normalized."""
        joins = self.tokenizer.backend_tokenizer.normalizer is not None
        return [text for text in texts() if not joins or "\u0301" not in text]

    def sequences(self) -> list[list[int]]:
        """Ids of texts, every id alone, and ids at random: characters cut anywhere, and bytes that are none."""
        draw, every = random.Random(2), len(self.tokenizer)
        known = [self.tokenizer.encode(text, add_special_tokens=False) for text in self.texts()]
        alone = [[token] for token in range(min(every, 2000))]
        return known + alone + [[draw.randrange(every) for _ in range(60)] for _ in range(100)]


@pytest.fixture(scope="module")
def smollm2_bundle(smollm2_gguf: Path, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with the tokenizer that an export of the GGUF has: no model runs here."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("smollm2_text")
    tokenizer = AutoTokenizer.from_pretrained(str(smollm2_gguf.parent), gguf_file=smollm2_gguf.name)
    tokenizer.save_pretrained(folder / "tokenizer")
    return with_tokenizer(tiny_bundle, folder / "tokenizer", folder / "bundle")


@pytest.fixture(scope="module", params=["tiny", "smollm2", *SPLITS])
def side(
    request: pytest.FixtureRequest, driver: Path, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Side]:
    if request.param in SPLITS:
        folder = tmp_path_factory.mktemp(request.param)
        bundle = with_tokenizer(tiny_bundle, trained(request.param, folder / "tokenizer"), folder / "bundle")
    else:
        bundle = request.getfixturevalue(f"{request.param}_bundle")
    with Driver(driver.parent / "semkv_texts") as cpp:
        yield Side(cpp, bundle)


def test_ids_of_texts(side: Side):
    wanted = [side.tokenizer.encode(text, add_special_tokens=False) for text in side.texts()]
    assert side.cpp("encode", texts=side.texts()) == wanted and sum(map(len, wanted)) > 1000


def test_texts_of_ids(side: Side):
    """Those that are no UTF-8 as well, and those with a character 0, at which a C string would end."""
    given = side.sequences()
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    wanted = [side.tokenizer.decode(ids, **options) for ids in given]
    assert any("\0" in text for text in wanted) and any("\ufffd" in text[:-1] for text in wanted)
    assert side.cpp("decode", ids=given) == wanted


def test_a_stream_gives_whole_characters_with_the_same_tokens(side: Side):
    given, wanted = side.sequences(), []
    for ids in given:
        stream = TextStream(side.tokenizer)
        wanted.append([*[stream.push(token) for token in ids], stream.flush()])
    found = side.cpp("stream", ids=given)
    assert found == wanted
    # A hand's bytes come with several tokens, and are shown with the last of them.
    ids = side.tokenizer.encode("👍", add_special_tokens=False)
    assert len(ids) > 1 and side.cpp("stream", ids=[ids, ids[:-1]]) == [
        [*[""] * (len(ids) - 1), "👍", ""],
        [*[""] * (len(ids) - 1), "\ufffd"],
    ]


def test_a_conversation_has_the_ids_of_pythons(side: Side):
    """Turn by turn: the opening, then what follows each reply, which the cache has."""
    opening: list[dict[str, str]] = [{"role": "system", "content": "Be brief.\n"}]
    conversation = Conversation(ChatFormat(side.tokenizer, ()), opening)
    messages = list(opening)
    for asked, reply in [("Why is the sky blue? ä👍", "It scatters."), (' "quoted"\n', " and\n\n"), ("<b>", "")]:
        new = [{"role": "user", "content": asked}]
        messages += new
        do = "opening" if len(messages) == 2 else "following"
        assert side.cpp(do, messages=messages) == conversation.tokens(new)
        conversation.record(new, Reply(reply, reply))
        messages.append({"role": "assistant", "content": reply})
    template = ChatTemplate.of(side.tokenizer)
    assert template is not None
    for prompt in (True, False):
        wanted = template.render(messages, add_generation_prompt=prompt)
        assert side.cpp("render", messages=messages, prompt=prompt) == wanted


def test_ids_that_end_a_reply(side: Side):
    contract = json.loads((side.bundle / "bundle.json").read_text())["targets"]["onnxruntime-cpu"]["budgets"][0]
    stops = contract["contract"]["stop_ids"]
    form = ChatFormat(side.tokenizer, stops)
    assert side.cpp("stops") == list(dict.fromkeys(form.stop_ids)) and form.turns.end_ids(side.tokenizer)


def test_threads_share_a_tokenizer(side: Side):
    text = TEXTS[4]
    assert side.cpp("together", text=text) == [side.tokenizer.encode(text, add_special_tokens=False)] * 4


def test_wrong_arguments(side: Side):
    for bytes_, expected in (
        ([65, 0, 66], "no character 0"),
        ([65, 0xC3, 40], "not UTF-8 text (got byte 195 at offset 1"),
    ):
        with pytest.raises(CppError, match=expected.replace("(", r"\(")) as caught:
            side.cpp("encode_bytes", bytes=bytes_)
        assert caught.value.code == 1
    with pytest.raises(CppError, match=r"token: no token \(expected 0 or more, got -1\)"):
        side.cpp("decode", ids=[[5, -1]])
    user, assistant = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    for messages, got in (([user], "none of the assistant's"), ([user, assistant], "nothing after it")):
        with pytest.raises(CppError, match=f"no turn that goes on .*got {got}.* Ask for an opening"):
            side.cpp("following", messages=messages)


def test_what_is_not_there_is_a_sentence(driver: Path, tiny_bundle: Path, tmp_path: Path):
    """And no end of the process, as onnxruntime-genai's library makes of a missing ONNX Runtime."""
    program, given = driver.parent / "semkv_texts", {"bundle": str(tiny_bundle), **libraries()}
    install = r"Install onnxruntime-genai 0\.18 or newer \(pip install onnxruntime-genai\).* SEMKV_GENAI"
    for wrong, expected in (
        ({"genai": "/nowhere/lib.so"}, "text: onnxruntime-genai's library does not load .*/nowhere/lib.so.*" + install),
        (
            {"genai": given["onnxruntime"]},
            "not onnxruntime-genai's, or too old .*OgaCreateTok.*" + install,
        ),
        ({"genai": ""}, install),
        ({"onnxruntime": "/nowhere/ort.so"}, "ONNX Runtime's library does not load .* SEMKV_ONNXRUNTIME"),
        ({"onnxruntime": str(driver.parents[1] / "semkv/lib/libsemkv.so")}, "is not ONNX Runtime's: .*libsemkv.so"),
    ):
        with Driver(program) as cpp, pytest.raises(CppError, match=expected) as caught:
            cpp("open", **{**given, **wrong})
        assert caught.value.code == 4
    other = Path(shutil.copy(given["onnxruntime"], tmp_path / "libother.so"))
    expected = r"would find another ONNX Runtime, or none .*ORT_LIB_PATH"
    with Driver(program, {"ORT_LIB_PATH": str(other)}) as cpp, pytest.raises(CppError, match=expected):
        cpp("open", **given)
    with Driver(program, {"SEMKV_GENAI": given["genai"], "SEMKV_ONNXRUNTIME": given["onnxruntime"]}) as cpp:
        cpp("open", bundle=str(tiny_bundle))
        assert cpp("decode", ids=[[0]]) == [""]


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"decoder": {"type": "Metaspace"}},
            r"decoder: .*expected byte-level BPE \(ByteLevel\), got .*Metaspace",
        ),
        ({"decoder": None}, r"expected byte-level BPE .*got null\)\. Give ids, which Python's tokenizer makes"),
        ({"normalizer": {"type": "Lowercase"}}, r"json: normalizer: onnxruntime-genai was not compared .*Lowercase"),
        ({"pre_tokenizer": {**BYTE_LEVEL, "add_prefix_space": True}}, r"pre_tokenizer: .*\"add_prefix_space\":true"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [DIGITS, BYTE_LEVEL]}}, "pre_tokenizer: .*Digits"),
        ({"pre_tokenizer": None}, "pre_tokenizer: .*got null"),
        ({"added_tokens": [{"id": 0, "content": "x", "special": True, "lstrip": True}]}, "added_tokens: .*lstrip"),
        ({"model": {"type": "BPE", "vocab": {"a": "b"}}}, "tokenizer/tokenizer.json: not a tokenizer's file"),
        ({"model": {"type": "BPE", "vocab": {"a": -1}}}, "no id of a token .got -1"),
    ],
)
def test_a_tokenizer_of_another_kind(
    change: dict[str, Any], expected: str, driver: Path, tiny_bundle: Path, tmp_path: Path
):
    tokenizer = Path(shutil.copytree(tiny_bundle / "tokenizer", tmp_path / "tokenizer"))
    path = tokenizer / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **change}), encoding="utf-8")
    bundle = with_tokenizer(tiny_bundle, tokenizer, tmp_path / "bundle")
    with Driver(driver.parent / "semkv_texts") as cpp, pytest.raises(CppError, match=expected):
        cpp("open", bundle=str(bundle), **libraries())


def test_texts_are_normalized_where_the_tokenizer_would(driver: Path, tiny_bundle: Path, tmp_path: Path):
    """The library does not: what is taken is normalized already."""
    bundle = with_tokenizer(tiny_bundle, trained("qwen", tmp_path / "tokenizer"), tmp_path / "bundle")
    every = [chr(code) for code in range(1, 0x30000) if not 0xD800 <= code < 0xE000]
    draw = random.Random(3)
    marks = [one for one in every if unicodedata.combining(one)]
    pairs = ["a" + draw.choice(marks) + draw.choice(marks) for _ in range(2000)]
    with Driver(driver.parent / "semkv_texts") as cpp:
        cpp("open", bundle=str(bundle), **libraries())
        taken = cpp("taken", texts=every + pairs)
        normal = [unicodedata.is_normalized("NFC", text) for text in every + pairs]
        assert not any(one and not other for one, other in zip(taken, normal, strict=True))
        refused = [text for text, one, other in zip(every, taken, normal, strict=False) if other and not one]
        assert len(refused) < 150 and any(taken[len(every) :])  # marks alone, which may join a letter
        with pytest.raises(CppError, match=r"text: not surely in Unicode's form NFC, .* Normalize it"):
            cpp("encode", texts=["e\u0301"])


def test_the_table_of_unicode_is_as_its_script_writes_it(capsys: pytest.CaptureFixture[str]):
    import nfc_ranges

    table = (Path(__file__).resolve().parents[2] / "plugins" / "runtime" / "text" / "nfc_ranges.inc").read_text()
    if f"Unicode {unicodedata.unidata_version}," not in table:
        pytest.skip(f"Python has Unicode {unicodedata.unidata_version}, the table another")
    nfc_ranges.main()
    assert capsys.readouterr().out == table


def test_a_model_without_a_chat_template(driver: Path, tiny_bundle: Path, tmp_path: Path):
    """Its texts are encoded as they are."""
    tokenizer = Path(shutil.copytree(tiny_bundle / "tokenizer", tmp_path / "tokenizer"))
    (tokenizer / "chat_template.jinja").unlink()
    bundle = with_tokenizer(tiny_bundle, tokenizer, tmp_path / "bundle")
    with Driver(driver.parent / "semkv_texts") as cpp:
        cpp("open", bundle=str(bundle), **libraries())
        assert cpp("encode", texts=["a"]) == [load_tokenizer(bundle).encode("a")] and len(cpp("stops")) == 1
        with pytest.raises(CppError, match=r"messages: the tokenizer has no chat template\. Encode texts as they are"):
            cpp("opening", messages=[{"role": "user", "content": "a"}])


def test_what_the_template_refuses(driver: Path, tiny_bundle: Path, tmp_path: Path):
    tokenizer = Path(shutil.copytree(tiny_bundle / "tokenizer", tmp_path / "tokenizer"))
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}x"
    (tokenizer / "chat_template.jinja").write_text(template, encoding="utf-8")
    bundle = with_tokenizer(tiny_bundle, tokenizer, tmp_path / "bundle")
    with Driver(driver.parent / "semkv_texts") as cpp:
        cpp("open", bundle=str(bundle), **libraries())
        with pytest.raises(CppError, match=r"refuses the conversation .*no system here"):
            cpp("opening", messages=[{"role": "system", "content": "a"}])
        messages = [{"role": role, "content": "a"} for role in ("user", "assistant", "user")]
        with pytest.raises(CppError, match="does not show replies, so a chat cannot go on"):
            cpp("following", messages=messages)


def test_an_altered_tokenizer_is_refused(driver: Path, tiny_bundle: Path, tmp_path: Path):
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    path = bundle / "tokenizer" / "tokenizer.json"
    path.write_bytes(path.read_bytes().replace(b"<|im_end|>", b"<|im_und|>"))
    with Driver(driver.parent / "semkv_texts") as cpp, pytest.raises(CppError, match="file of the bundle was altered"):
        cpp("open", bundle=str(bundle), **libraries())


def test_under_the_address_sanitizer(address_driver: Path, tiny_bundle: Path):
    with Driver(address_driver.parent / "semkv_texts", {"ASAN_OPTIONS": "detect_leaks=1"}) as cpp:
        side = Side(cpp, tiny_bundle)
        test_ids_of_texts(side)
        test_texts_of_ids(side)
        test_a_stream_gives_whole_characters_with_the_same_tokens(side)
        test_a_conversation_has_the_ids_of_pythons(side)
        test_wrong_arguments(side)
        test_threads_share_a_tokenizer(side)


def test_nothing_is_left_behind_or_told(driver: Path, tiny_bundle: Path, tmp_path: Path):
    """The copies that the library read are gone; its telemetry, which would leave a file there, never began."""
    environment = {"TMPDIR": str(tmp_path), "CI": ""}  # where it is set, there is no telemetry anyway
    with Driver(driver.parent / "semkv_texts", environment) as cpp:
        Side(cpp, tiny_bundle)
        assert list(tmp_path.iterdir()) == []
    assert list(tmp_path.iterdir()) == []


def test_links_nothing_of_genais(installed: Path):
    command = ["readelf", "-d", str(installed / "lib" / "libsemkv_text.so")]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "libsemkv.so.1" in out and "$ORIGIN" in out and "onnxruntime" not in out
    assert os.path.getsize(installed / "lib" / "libsemkv_text.so") < 4 << 20
