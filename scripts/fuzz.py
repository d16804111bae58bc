"""Feeds the product damaged files for as long as asked: every one must end in success or in one sentence.

    python scripts/fuzz.py --seconds 3600
    python scripts/fuzz.py --seed 17 --kind gguf --count 1      # one case again

A case is a seed: what it damages, and how, follows from it. Kinds: bundles (any file, hashes put right half of the
time), manifests, ONNX graphs, GGUF and safetensors files, checkpoints' JSON, recipes, option values, chat templates.
Cases run in this process, so that thousands fit a minute; a clock ends what hangs. Wrong is anything but success or
`SemkvError` (or, of reading a file, `OSError`), a case that takes longer than `LIMIT`, and a change to any file outside
the folder that the case was given.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

LIMIT = 60
"""Seconds a case may take."""

Damage = Callable[[bytes, random.Random], bytes]


class Samples(NamedTuple):
    """Sound inputs: an export, a bundle and a checkpoint of one tiny model, and a GGUF file (None: none)."""

    export: Path
    bundle: Path
    checkpoint: Path
    gguf: Path | None


class Hang(BaseException):
    """A case took too long; no `Exception`, so that nothing catches it."""


def flip(data: bytes, random: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(random.choice((1, 2, 8, 64))):
        if changed:
            changed[random.randrange(len(changed))] = random.randrange(256)
    return bytes(changed)


def head(data: bytes, random: random.Random) -> bytes:
    """Changes bytes of the first thousand: headers, counts and lengths."""
    return flip(data[:1000], random) + data[1000:]


def cut(data: bytes, random: random.Random) -> bytes:
    return data[: random.randrange(len(data) + 1)]


def insert(data: bytes, random: random.Random) -> bytes:
    at = random.randrange(len(data) + 1)
    what = random.choice((b"\0", b"\xff" * 8, b"\x00" * 64, b"[" * 3000, b"{" * 3000, b"\x1b[31m", b"\xed\xa0\x80"))
    return data[:at] + what + data[at:]


def swap(data: bytes, random: random.Random) -> bytes:
    first, second = sorted(random.randrange(len(data) + 1) for _ in range(2))
    return data[second:] + data[first:second] + data[:first]


def empty(data: bytes, random: random.Random) -> bytes:
    return b""


DAMAGES: tuple[Damage, ...] = (flip, flip, head, head, cut, insert, swap, empty)

ODD: tuple[Any, ...] = (
    None, True, -1, 0, 2**31, 2**63, 10**400, 1e308, float("nan"), "", "\0", "../x", "/etc/passwd", "[red]x[/red]",
    "\x1b[2J", "x" * 5000, [], {}, [[]], {"a": {}}, [0] * 1000, "\ud800",
)  # fmt: skip
"""Values to put where another stood."""


def odd_json(data: bytes, random: random.Random) -> bytes:
    """JSON with one value somewhere in it exchanged, removed or doubled; other text is damaged as bytes."""
    try:
        whole = json.loads(data)
    except ValueError:
        return random.choice(DAMAGES)(data, random)
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, inner in items:
            places.append((value, key))
            walk(inner)

    walk(whole)
    if not places:
        return flip(data, random)
    holder, key = random.choice(places)
    if random.random() < 0.2:
        del holder[key]
    else:
        holder[key] = random.choice(ODD)
    return json.dumps(whole).encode("utf-8", errors="surrogatepass")


def damaged(file: Path, random: random.Random) -> None:
    data = file.read_bytes()
    how = odd_json if file.suffix == ".json" and random.random() < 0.6 else random.choice(DAMAGES)
    file.write_bytes(how(data, random))


def rehash(root: Path) -> None:
    """Puts the hashes of a bundle right, as somebody who means harm would."""
    with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
        manifest = json.loads((root / "bundle.json").read_bytes())
        for name in manifest["files"]:
            data = (root / name).read_bytes()
            manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        (root / "bundle.json").write_text(json.dumps(manifest))


def open_and_run(root: Path) -> None:
    from semkv_deploy.cli.bundle_summary import summary
    from semkv_deploy.runtime.open import open_bundle, open_session

    bundle = open_bundle(root)
    with contextlib.redirect_stdout(io.StringIO()):
        summary(bundle)
    session = open_session(bundle, threads=1)
    session.prefill([5, 6, 7])
    session.step([8])


def fuzz_bundle(samples: Samples, folder: Path, random: random.Random) -> None:
    root = folder / "bundle"
    shutil.copytree(samples.bundle, root)
    files = sorted(file for file in root.rglob("*") if file.is_file())
    for _ in range(random.choice((1, 1, 3))):
        damaged(random.choice(files), random)
    if random.random() < 0.5:
        rehash(root)
    open_and_run(root)


def fuzz_manifest(samples: Samples, folder: Path, random: random.Random) -> None:
    root = folder / "bundle"
    shutil.copytree(samples.bundle, root)
    file = root / "bundle.json"
    file.write_bytes(odd_json(file.read_bytes(), random))
    open_and_run(root)


def fuzz_onnx(samples: Samples, folder: Path, random: random.Random) -> None:
    from semkv_deploy.cli.lint_report import lint_file
    from semkv_deploy.model.exported import open_export

    source = random.choice([samples.export / "decoder.onnx", samples.bundle / "targets/onnxruntime-cpu/decoder.onnx"])
    for file in source.parent.glob("*"):
        if file.is_file():
            shutil.copy(file, folder)
    damaged(folder / "decoder.onnx", random)
    shutil.copytree(samples.export / "tokenizer", folder / "tokenizer", dirs_exist_ok=True)
    with contextlib.suppress(_error()):
        open_export(folder / "decoder.onnx")
    # Not onnxruntime-cpu: its lint starts a process for each file, a second each.
    lint_file(folder / "decoder.onnx", random.choice(("tensorrt-rtx", "onnxruntime-cuda")))


def fuzz_export(samples: Samples, folder: Path, random: random.Random) -> None:
    from semkv_deploy.model.delimiters import Delimiters
    from semkv_deploy.model.exported import open_export

    root = folder / "export"
    shutil.copytree(samples.export, root)
    damaged(random.choice([root / name for name in ("model.json", "delimiters.json", "decoder.onnx")]), random)
    open_export(root / "decoder.onnx")
    Delimiters.read(root / "delimiters.json")


def fuzz_checkpoint(samples: Samples, folder: Path, random: random.Random) -> None:
    from semkv_deploy.export.checkpoint import load_checkpoint

    root = folder / "checkpoint"
    shutil.copytree(samples.checkpoint, root)
    damaged(random.choice(sorted(root.iterdir())), random)
    load_checkpoint(str(root))


def fuzz_safetensors(samples: Samples, folder: Path, random: random.Random) -> None:
    """The header: a length, then JSON of names, types, shapes and offsets."""
    from semkv_deploy.export.checkpoint import load_checkpoint

    root = folder / "checkpoint"
    shutil.copytree(samples.checkpoint, root)
    file = root / "model.safetensors"
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = odd_json(data[8 : 8 + size], random)
    length = len(header) if random.random() < 0.8 else random.choice((0, 2**31, 2**63, len(data)))
    file.write_bytes(length.to_bytes(8, "little") + header + data[8 + size :])
    load_checkpoint(str(root))


def fuzz_gguf(samples: Samples, folder: Path, random: random.Random) -> None:
    from semkv_deploy.export.checkpoint import load_checkpoint
    from semkv_deploy.export.gguf import check_parts, read_header

    if samples.gguf is None:
        return
    file = folder / "model.gguf"
    file.write_bytes(random.choice(DAMAGES)(samples.gguf.read_bytes(), random))
    if random.random() < 0.8:
        check_parts(file, read_header(file))
    else:
        load_checkpoint(str(file))


RECIPE = b"family: llama\nbudget: [0.2, 0.5]\nmax-context: 256\nweights: fp32\nmethod-option: {sinks: 4, recent: 0.5}\n"
SCRAPS = (b"&a ", b"*a", b"[", b"{", b"- ", b": ", b"!!python/object:os.system ", b"<<: *a\n", b"? ", b"|\n")


def scrambled(data: bytes, random: random.Random) -> bytes:
    for _ in range(random.choice((1, 3, 9))):
        at = random.randrange(len(data) + 1)
        data = data[:at] + random.choice(SCRAPS) * random.choice((1, 1, 50)) + data[at:]
    return data if random.random() < 0.7 else random.choice(DAMAGES)(data, random)


def fuzz_recipe(samples: Samples, folder: Path, random: random.Random) -> None:
    from semkv_deploy.cli.build import build
    from semkv_deploy.cli.recipe import load_recipe

    file = folder / "recipe.yaml"
    file.write_bytes(scrambled(RECIPE, random))
    load_recipe(file, build)


def fuzz_option(samples: Samples, folder: Path, random: random.Random) -> None:
    from semkv_deploy.budget import parse_budget
    from semkv_deploy.cli.options import _parse_method
    from semkv_deploy.runtime.sampling import Sampler
    from semkv_deploy.sizes import parse_size

    scrap = scrambled(random.choice((b"4", b"0.5", b"head", b"2GiB", b"[1, 2]")), random)
    value, name = scrap.decode(errors="surrogateescape"), random.choice(("sinks", "recent", "ladder", "x"))
    number = random.choice([odd for odd in ODD if isinstance(odd, float | int) and odd is not True])
    calls: tuple[Callable[[], object], ...] = (
        lambda: _parse_method("semanticache", (f"{name}={value}",), "full"),
        lambda: parse_budget(value),
        lambda: parse_size(value),
        lambda: Sampler(temperature=number, top_p=1.0),
        lambda: Sampler(temperature=1.0, top_p=number),
    )
    random.choice(calls)()


TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PIECES = (
    "{% for i in range(99999) %}", "{% endfor %}", "{{ 'x' * 99999999 }}", "{{ messages[9] }}", "{% if %}",
    "{{ m.x.y }}", "{% set messages = [] %}", "{{ raise_exception('[red]no') }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ ''.__class__ }}", "{% include 'x' %}", "{{ 1 / 0 }}", "{{ messages | tojson }}", "\0", "{{ '\x1b[2J' }}",
)  # fmt: skip


def fuzz_template(samples: Samples, folder: Path, random: random.Random) -> None:
    from semkv_deploy.model.template import ChatTemplate
    from semkv_deploy.model.turns import Turns

    source = TEMPLATE
    for _ in range(random.choice((1, 1, 2, 4))):
        at = random.randrange(len(source) + 1)
        source = source[:at] + random.choice(PIECES) + source[at:]
    template = ChatTemplate(source, {"bos_token": "<s>"})
    try:
        turns = Turns(template)
        turns.opening([{"role": "user", "content": "Hello"}])
        turns.following([{"role": "user", "content": "Hello"}], "And?")
    finally:
        template.close()


KINDS: dict[str, Callable[[Samples, Path, random.Random], None]] = {
    "bundle": fuzz_bundle,
    "manifest": fuzz_manifest,
    "onnx": fuzz_onnx,
    "export": fuzz_export,
    "checkpoint": fuzz_checkpoint,
    "safetensors": fuzz_safetensors,
    "gguf": fuzz_gguf,
    "recipe": fuzz_recipe,
    "option": fuzz_option,
    "template": fuzz_template,
}


def _error() -> type[Exception]:
    from semkv_deploy.errors import SemkvError

    return SemkvError


@contextlib.contextmanager
def clock(seconds: int) -> Iterator[None]:
    """Raises `Hang` in the block when it takes longer."""

    def ring(number: int, frame: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def seen(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file below a folder."""
    return {
        str(file.relative_to(folder)): (file.stat().st_size, file.stat().st_mtime_ns)
        for file in folder.rglob("*")
        if file.is_file()
    }


def one(kind: str, seed: int, samples: Samples, around: Path) -> str | None:
    """Runs a case in a folder of its own below `around`; returns what was wrong, or None."""
    (around / "bystander").write_text("untouched")
    folder = around / "case"
    folder.mkdir()
    watched = [around, samples.export, samples.bundle, samples.checkpoint]
    before = [seen(place) for place in watched]
    started = time.monotonic()
    try:
        with clock(LIMIT), contextlib.redirect_stderr(io.StringIO()):
            KINDS[kind](samples, folder, random.Random(f"{kind} {seed}"))
    except Hang:
        return f"takes longer than {LIMIT} s"
    except (_error(), OSError) as error:
        if "\n" in str(error).strip() and not isinstance(error, OSError) and len(str(error)) > 20_000:
            return f"a sentence of {len(str(error))} characters"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        return "".join(traceback.format_exception(error)[-4:])
    finally:
        took = time.monotonic() - started
        shutil.rmtree(folder)
    for place, old in zip(watched, before, strict=True):
        if seen(place) != old:
            return f"files changed in {place.name}"
    return f"took {took:.0f} s" if took > LIMIT / 2 else None


def make_samples(root: Path) -> Samples:
    """A tiny model's checkpoint, export and bundle, and a GGUF file of a few tensors."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from tests.tiny import tiny_bundle_at, tiny_checkpoint_at, tiny_export_at, tiny_gguf_at

    checkpoint = tiny_checkpoint_at(root / "checkpoint")
    export = tiny_export_at(checkpoint, root / "export")
    return Samples(export, tiny_bundle_at(export, root / "bundle"), checkpoint, tiny_gguf_at(root / "tiny.gguf"))


def run(samples: Samples, kinds: list[str], first: int, count: int | None, seconds: float | None) -> dict[str, str]:
    """Runs cases until `count` of each kind are done or the time is up; returns faults by `kind seed`."""
    faults: dict[str, str] = {}
    done, started = 0, time.monotonic()
    for seed in range(first, first + count if count is not None else sys.maxsize):
        for kind in kinds:
            if seconds is not None and time.monotonic() - started > seconds:
                return faults
            with tempfile.TemporaryDirectory() as around:
                fault = one(kind, seed, samples, Path(around))
            done += 1
            if fault is not None:
                faults[f"--kind {kind} --seed {seed}"] = fault
                print(f"--kind {kind} --seed {seed}: {fault}", flush=True)
        if seed % 50 == 49:
            print(f"{done} cases, {len(faults)} faults, {time.monotonic() - started:.0f} s", flush=True)
    return faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, help="stop after so long")
    parser.add_argument("--count", type=int, help="cases of each kind")
    parser.add_argument("--seed", type=int, default=0, help="the first case")
    parser.add_argument("--kind", action="append", choices=sorted(KINDS), help="only this kind; several times")
    options = parser.parse_args()
    if options.seconds is None and options.count is None:
        options.seconds = 60
    with tempfile.TemporaryDirectory() as root:
        samples = make_samples(Path(root))
        faults = run(samples, options.kind or list(KINDS), options.seed, options.count, options.seconds)
    print(f"{len(faults)} faults")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
