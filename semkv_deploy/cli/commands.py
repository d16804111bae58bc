"""The command line: commands only; what they do lives in the modules they call."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from semkv_deploy import __version__
from semkv_deploy.errors import SemkvError

if TYPE_CHECKING:
    from semkv_deploy.methods import AnyMethod

TARGET_OPTION = click.option("--target", default="onnxruntime-cpu", show_default=True, help="Runtime to use.")
BUDGET_HELP = "Share of cache entries kept, 0 < budget <= 1"
METHOD_NAMES = ["semanticache", "streaming-llm", "full"]


class _Commands(click.Group):
    """Turns a `SemkvError` or `OSError` into one sentence and exit code 1, unless --debug asks for the traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        # A terminated build cleans up like an interrupted one.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            return super().invoke(ctx)
        except (SemkvError, OSError) as error:
            # A reader of standard output that is gone (`| head`) is click's to handle.
            if ctx.params.get("debug") or isinstance(error, BrokenPipeError):
                raise
            click.echo(f"error: {_sentence(error)}", err=True)
            ctx.exit(1)
        except KeyboardInterrupt:
            click.echo("interrupted: nothing was written", err=True)
            ctx.exit(130)


def _sentence(error: SemkvError | OSError) -> str:
    """An error as one line: of the system's errors, the file and why."""
    if isinstance(error, SemkvError) or error.strerror is None:
        return " ".join(str(error).split())
    return f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="semkv-deploy")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Builds and runs decoder LLMs whose KV cache is compressed under a fixed memory budget.

    \b
    semkv-deploy build ./my-model --budget 0.2 -o bundle/
    semkv-deploy generate bundle/ --prompt "Why is the sky blue?"
    """


@contextmanager
def _progress() -> Iterator[Callable[[str, float | None], None]]:
    """A progress bar on a terminal, a line per phase elsewhere; both on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = [SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=24), TimeElapsedColumn()]
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        phases: dict[str, Any] = {}

        def report(what: str, share: float | None) -> None:
            if what not in phases:
                for task in phases.values():
                    bar.update(task, total=1, completed=1)
                phases[what] = bar.add_task(what, total=None)
                if not console.is_terminal:
                    click.echo(what, err=True)
            if share is not None:
                bar.update(phases[what], total=1, completed=share)

        yield report
        for task in phases.values():
            bar.update(task, total=1, completed=1)


def _method(kind: str, options: tuple[str, ...], compress_at: str) -> AnyMethod:
    import yaml

    from semkv_deploy.methods import method_from_options

    values: dict[str, Any] = {"compress_at": compress_at}
    for option in options:
        name, separator, value = option.partition("=")
        if not separator:
            raise SemkvError("not of the form name=value", where="--method-option", got=option)
        values[name.replace("-", "_")] = yaml.safe_load(value)
    return method_from_options(kind, values)


METHOD_OPTIONS = [
    click.option(
        "--method",
        type=click.Choice(METHOD_NAMES),
        default="semanticache",
        show_default=True,
        help="Compression method.",
    ),
    click.option(
        "--method-option",
        multiple=True,
        metavar="NAME=VALUE",
        help="Parameter of the method, such as cluster_by=head, merge_keys=cached, ladder=paper, recent=0.5, sinks=4.",
    ),
    click.option(
        "--compress-at",
        type=click.Choice(["full", "turn"]),
        default="full",
        show_default=True,
        help="When the cache is full, or at every turn end as well.",
    ),
]


TENSORRT_OPTIONS = [
    click.option(
        "--dtype",
        default="float16",
        show_default=True,
        metavar="TYPE",
        help="TensorRT: type of weights and caches: float16, bfloat16 or float32.",
    ),
    click.option(
        "--layout",
        type=click.Choice(["dual", "single", "split"]),
        default="dual",
        show_default=True,
        help="TensorRT: prefill and decode as two optimization profiles, as one, or as two engines.",
    ),
    click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="TensorRT: rows decoded."),
    click.option(
        "--compute-capability",
        "compute_capabilities",
        metavar="LIST",
        help="TensorRT-RTX: GPUs one engine is for, such as 86,89,120.  [default: 80,86,89,120]",
    ),
    click.option(
        "--plugins",
        default="none",
        show_default=True,
        metavar="LIST",
        help="TensorRT: operators that are plugins: none, auto, or names such as nexus_attention,semantic_cluster.",
    ),
    click.option(
        "--plugin-library", type=click.Path(path_type=Path), help="TensorRT: libsemkv_plugins.so, embedded in engines."
    ),
    click.option("--memory-limit", metavar="SIZE", help="TensorRT: workspace of the builder at most, such as 2GiB."),
    click.option(
        "--engine-cache", type=click.Path(path_type=Path), help="TensorRT: folder of engines to reuse and add to."
    ),
    click.option("--no-engines", is_flag=True, help="TensorRT: write the graphs and contracts, build no engine."),
]


def _check_dtype(dtype: str) -> None:
    if dtype not in ("float16", "bfloat16", "float32"):
        eight = dtype in ("int8", "fp8")
        raise SemkvError(
            "TensorRT's in-place append takes no 8-bit cache" if eight else "unknown element type",
            where="--dtype",
            expected="float16, bfloat16 or float32",
            got=dtype,
            fix="use --dtype float16; 8-bit caches are for hosts of the NexusAttention plugin" if eight else None,
        )


def _tensorrt_options(values: dict[str, Any]) -> Any:
    from semkv_deploy.targets.tensorrt.build import TensorRTOptions

    _check_dtype(values["dtype"])
    limit = values["memory_limit"]
    if limit is not None:
        from semkv_deploy.memory.estimate import parse_size

        limit = parse_size(limit)
    return TensorRTOptions(
        dtype=values["dtype"],
        layout=values["layout"],
        batch=values["batch"],
        compute_capabilities=values["compute_capabilities"],
        plugins=tuple(values["plugins"].split(",")),
        plugin_library=values["plugin_library"],
        memory_limit=limit,
        engine_cache=values["engine_cache"],
        engines=not values["no_engines"],
    )


def _with(options: list[Any]) -> Callable[[Any], Any]:
    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


@main.command()
@click.argument("source")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Directory to write.")
@click.option("--force", is_flag=True, help="Replace the output directory.")
@_with(METHOD_OPTIONS)
def export(
    source: str, output: Path, force: bool, method: str, method_option: tuple[str, ...], compress_at: str
) -> None:
    """Traces a checkpoint to portable ONNX with semkv operators.

    SOURCE is a Hugging Face directory, a .gguf file, or a hub id.

    \b
    semkv-deploy export ./SmolLM2-135M-Instruct -o exported/
    """
    chosen = _method(method, method_option, compress_at)
    from semkv_deploy.export import export_model

    with _progress() as progress:
        facts = export_model(source, output, chosen, force=force, progress=progress)
    click.echo(f"{output}: {facts.family}, {facts.layers} layers, {facts.kv_heads} KV heads of {facts.head_dim}")


def _read_recipe(ctx: click.Context, _: click.Parameter, path: Path | None) -> str | None:
    """Makes the recipe's values the command's defaults; returns the family it is for."""
    if path is None:
        return None
    from semkv_deploy.cli.recipe import FAMILY, load_recipe

    values = load_recipe(path, ctx.command)
    family = values.pop(FAMILY)
    ctx.default_map = values
    return str(family)


@main.command()
@click.argument("source")
@click.option(
    "--recipe",
    "family",
    type=click.Path(path_type=Path),
    is_eager=True,
    callback=_read_recipe,
    help="YAML file with these options; those given here as well win.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("bundle"), show_default=True)
@click.option("--budget", "budgets", multiple=True, required=True, help=f"{BUDGET_HELP}; may be given several times.")
@click.option("--max-context", type=int, help="Most tokens of a conversation.  [default: the model's, at most 8192]")
@click.option(
    "--target",
    "targets",
    multiple=True,
    default=["onnxruntime-cpu"],
    show_default=True,
    help="Runtime to build for: onnxruntime-cpu, tensorrt-rtx, tensorrt; may be given several times.",
)
@click.option(
    "--weights",
    type=click.Choice(["fp32", "int8", "int4"]),
    default="int4",
    show_default=True,
    help="How ONNX Runtime targets store weights.",
)
@_with(TENSORRT_OPTIONS)
@click.option(
    "--calibration-text", type=click.Path(path_type=Path), help="Text to calibrate on.  [default: one that ships here]"
)
@click.option("--force", is_flag=True, help="Replace the output directory.")
@_with(METHOD_OPTIONS)
def build(
    source: str,
    family: str | None,
    output: Path,
    budgets: tuple[str, ...],
    max_context: int | None,
    targets: tuple[str, ...],
    weights: Any,
    calibration_text: Path | None,
    force: bool,
    method: str,
    method_option: tuple[str, ...],
    compress_at: str,
    **tensorrt: Any,
) -> None:
    """Builds a bundle from decoder.onnx of an export, or from anything `export` takes.

    \b
    semkv-deploy build exported/decoder.onnx --budget 0.2 --budget 0.5 -o bundle/
    semkv-deploy build exported/decoder.onnx --budget 0.2 --target tensorrt-rtx --compute-capability 86,89 -o bundle/
    semkv-deploy build ./my-model --recipe recipes/qwen3-8b/tensorrt-rtx.yaml -o bundle/
    """
    from semkv_deploy.budget import parse_budget
    from semkv_deploy.cli.bundle_summary import summary
    from semkv_deploy.compiler.pipeline import build_bundle

    chosen = _method(method, method_option, compress_at)
    shares = [parse_budget(budget) for budget in budgets]
    text = None
    if calibration_text is not None:
        if not calibration_text.is_file():
            raise SemkvError("no such file", where=f"--calibration-text {calibration_text}")
        try:
            text = calibration_text.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise SemkvError(
                "not UTF-8 text",
                where=f"--calibration-text {calibration_text}",
                got=f"byte {calibration_text.read_bytes()[error.start]:#04x} at offset {error.start}",
                fix="convert the file, or give another",
            ) from None
    with _progress() as progress:
        bundle = build_bundle(
            source,
            output,
            budgets=shares,
            method=chosen,
            max_context=max_context,
            target=targets,
            weights=weights,
            tensorrt=_tensorrt_options(tensorrt),
            family=family,
            calibration_text=text,
            force=force,
            progress=progress,
        )
    summary(bundle)


@main.command()
@click.argument("source")
@click.option("--budget", "budgets", multiple=True, required=True, help=f"{BUDGET_HELP}; may be given several times.")
@click.option("--batch", "batches", type=int, multiple=True, default=[1], help="Rows; several times.  [default: 1]")
@click.option("--max-context", type=int, help="Most tokens of a conversation.  [default: the model's, at most 8192]")
@TARGET_OPTION
@click.option(
    "--weights", type=click.Choice(["fp32", "int8", "int4"]), default="int4", show_default=True, help="ONNX Runtime."
)
@click.option(
    "--dtype",
    default="float16",
    show_default=True,
    metavar="TYPE",
    help="TensorRT: type of weights and caches: float16, bfloat16 or float32.",
)
@click.option(
    "--layout", type=click.Choice(["dual", "single", "split"]), default="dual", show_default=True, help="TensorRT."
)
@click.option("--memory", metavar="SIZE", help="Memory there is, such as 8GiB: say what fits and the largest context.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with what each number is made of.")
@_with(METHOD_OPTIONS)
def plan(
    source: str,
    budgets: tuple[str, ...],
    batches: tuple[int, ...],
    max_context: int | None,
    target: str,
    weights: Any,
    dtype: Any,
    layout: Any,
    memory: str | None,
    as_json: bool,
    method: str,
    method_option: tuple[str, ...],
    compress_at: str,
) -> None:
    """Says what a build would need in memory, before anything is built; no weights are read.

    SOURCE is decoder.onnx of an export, or a directory with config.json.

    \b
    semkv-deploy plan exported/decoder.onnx --budget 0.2 --budget 0.5 --batch 1 --batch 8 --memory 2GiB
    """
    from semkv_deploy.budget import parse_budget
    from semkv_deploy.memory import report as plan_report
    from semkv_deploy.memory.estimate import make_plan, parse_size

    _check_dtype(dtype)
    found = make_plan(
        source,
        budgets=[parse_budget(budget) for budget in budgets],
        method=_method(method, method_option, compress_at),
        batches=batches,
        max_context=max_context,
        target=target,
        weights=weights,
        dtype=dtype,
        layout=layout,
        memory=None if memory is None else parse_size(memory),
    )
    if as_json:
        click.echo(plan_report.as_json(found))
    else:
        plan_report.show(found)


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--prompt", help="One prompt; without it, a chat until an empty line.")
@click.option("--raw", is_flag=True, help="Complete the prompt as it is, without the chat template.")
@click.option("--system", help="System message.")
@click.option("--budget", help=f"{BUDGET_HELP}.  [default: the smallest built]")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True)
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-p", type=float, default=1.0, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--stats", is_flag=True, help="Say afterwards what compression did.")
@TARGET_OPTION
def generate(
    bundle: Path,
    prompt: str | None,
    raw: bool,
    system: str | None,
    budget: str | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    stats: bool,
    target: str,
) -> None:
    """Generates text from a bundle: one prompt, or a chat.

    \b
    semkv-deploy generate bundle/ --prompt "Why is the sky blue?" --budget 0.2
    """
    from semkv_deploy.budget import parse_budget
    from semkv_deploy.cli.chat import run
    from semkv_deploy.runtime.sampling import Sampler

    if raw and prompt is None:
        raise SemkvError("needs a prompt", where="--raw", fix="add --prompt")
    run(
        bundle,
        prompt=prompt,
        raw=raw,
        system=system,
        budget=parse_budget(budget) if budget is not None else None,
        max_new_tokens=max_new_tokens,
        sampler=Sampler(temperature, top_p, seed),
        stats=stats,
        target=target,
    )


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--lint", is_flag=True, help="Say what a target would refuse, ignore or do slowly; takes any ONNX file.")
@click.option("--target", default="tensorrt-rtx", show_default=True, help="Whose rules --lint applies to a file.")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest, or the findings, as JSON.")
def inspect(bundle: Path, lint: bool, target: str, as_json: bool) -> None:
    """Verifies a bundle and shows what is in it, or lints a bundle or an ONNX file.

    With --lint the exit code is 1 when a finding stops a build.

    \b
    semkv-deploy inspect bundle/ --json
    semkv-deploy inspect --lint model.onnx
    """
    if lint:
        from semkv_deploy.cli.lint_report import report

        if report(bundle, target=target, as_json=as_json):
            sys.exit(1)
        return
    from semkv_deploy.bundle import Bundle
    from semkv_deploy.cli.bundle_summary import check_engines, summary

    opened = Bundle.open(bundle)
    if as_json:
        click.echo(opened.manifest.model_dump_json(indent=1))
    else:
        summary(opened)
    check_engines(opened)


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--budget", "budgets", multiple=True, help=f"{BUDGET_HELP}; may be given several times.  [default: all]")
@click.option(
    "--target", "targets", multiple=True, help="Target to validate; may be given several times.  [default: all]"
)
@click.option(
    "--tokens",
    type=click.IntRange(min=30),
    help="Tokens of a row at most, over three turns.  [default: what overflows the cache, at most 2048]",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("reports"),
    show_default=True,
    help="Directory for validate.json and validate.html; never in the bundle.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def validate(
    bundle: Path, budgets: tuple[str, ...], targets: tuple[str, ...], tokens: int | None, output: Path, as_json: bool
) -> None:
    """Compares what each target runs with the portable graphs: logits, caches, chosen slots, lengths.

    Three turns of prefill, decode and compression. TensorRT's graphs are run in ONNX Runtime. When something differs,
    the first layer that does is named, and the exit code is 1. The report's page ends with command lines that run the
    same files in stock Polygraphy.

    \b
    semkv-deploy validate bundle/ --budget 0.2
    """
    from semkv_deploy.budget import parse_budget
    from semkv_deploy.validate import report

    report.run(
        bundle,
        budgets=[parse_budget(budget) for budget in budgets],
        targets=list(targets),
        tokens=tokens,
        output=output,
        json_only=as_json,
        progress_bar=_progress,
    )


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--context", type=click.IntRange(min=256), help="Tokens of context.  [default: the bundle's max-context]")
@click.option("--tokens", type=click.IntRange(min=4), default=32, show_default=True, help="Tokens decoded and timed.")
@click.option("--genai", type=click.Path(path_type=Path), help="onnxruntime-genai model directory to compare with.")
@click.option("--plot", type=click.Path(path_type=Path), help="Also draw a picture (needs matplotlib).")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@TARGET_OPTION
def bench(
    bundle: Path, context: int | None, tokens: int, genai: Path | None, plot: Path | None, as_json: bool, target: str
) -> None:
    """Measures decode time, prefill time and memory of every budget, each in a process of its own.

    \b
    semkv-deploy bench bundle/ --genai smollm2-genai/ --json
    """
    from semkv_deploy.bench import report

    report.run(bundle, context=context, tokens=tokens, genai=genai, plot=plot, as_json=as_json, target=target)


@main.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--text", type=click.Path(path_type=Path), required=True, help="Text to evaluate on.")
@click.option("--tokens", type=click.IntRange(min=512), default=2048, show_default=True, help="Tokens of it.")
@click.option("--budget", "budgets", multiple=True, default=["0.2", "0.5"], show_default=True, help=BUDGET_HELP)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def evaluate(bundle: Path, text: Path, tokens: int, budgets: tuple[str, ...], as_json: bool) -> None:
    """Measures what methods and their options cost in KL against the full cache, at equal capacity.

    \b
    semkv-deploy evaluate bundle/ --text moby-dick.txt --budget 0.2
    """
    from semkv_deploy.budget import parse_budget
    from semkv_deploy.evaluate import kl

    kl.run(bundle, text=text, tokens=tokens, budgets=[parse_budget(budget) for budget in budgets], as_json=as_json)


@main.command()
@click.option(
    "--plugin-library", type=click.Path(path_type=Path), help="Also list the TensorRT plugins that it registers."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def doctor(plugin_library: Path | None, as_json: bool) -> None:
    """Says which targets this machine can build for and run, and what is missing for the others.

    \b
    semkv-deploy doctor
    semkv-deploy doctor --plugin-library build/plugins/libsemkv_plugins.so
    """
    from semkv_deploy.cli.doctor import report

    report(as_json, plugin_library)


if __name__ == "__main__":
    sys.exit(main())
