"""Options that several commands take: each one, its check and its default are stated here and nowhere else.

A group is a decorator. It declares its options on a command, checks what was typed, and gives the command one object
in their place: `@method_options` adds `--method`, `--method-option` and `--compress-at`, and passes `method`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from semkv_deploy.choices import BudgetBy, CacheType, DType, EngineLayout, Native, WeightFormat
from semkv_deploy.errors import SemkvError
from semkv_deploy.sizes import parse_size

if TYPE_CHECKING:
    from semkv_deploy.budget_units import Budget
    from semkv_deploy.methods import AnyMethod
    from semkv_deploy.serve.options import ServingOptions
    from semkv_deploy.targets.tensorrt.build import TensorRTOptions

Decorator = Callable[[Any], Any]

PATH = click.Path(path_type=Path)


def _group(keyword: str, options: Sequence[Decorator], parse: Callable[..., Any]) -> Decorator:
    """Makes a decorator that adds `options` and passes what `parse` makes of them as `keyword`.

    Args:
        parse: its parameters are the names of the options.
    """
    names = tuple(inspect.signature(parse).parameters)

    def decorate(command: Callable[..., Any]) -> Any:
        @functools.wraps(command)
        def with_object(**values: Any) -> Any:
            own = {name: values.pop(name) for name in names}
            return command(**{keyword: parse(**own)}, **values)

        decorated: Any = with_object
        for option in reversed(options):
            decorated = option(decorated)
        return decorated

    return decorate


bundle_argument = click.argument("bundle", type=PATH)
source_argument = click.argument("source")


def _choice(name: str, choices: Any, default: str, help: str) -> Decorator:
    """An option that takes one of a literal type's values."""
    return click.option(name, type=click.Choice(get_args(choices)), default=default, show_default=True, help=help)


force_option = click.option("--force", is_flag=True, help="Replace the output directory.")
max_context_option = click.option(
    "--max-context", type=int, help="Most tokens of a conversation.  [default: the model's, at most 8192]"
)
cache_groups_option = click.option(
    "--cache-groups",
    metavar="GROUPS",
    help="KV heads that share a capacity: layer, head, or a JSON file with heads and shares.  [default: layer]",
)
budget_by_option = click.option(
    "--budget-by",
    type=click.Choice(get_args(BudgetBy)),
    help="Calibrate how much of each budget every layer or KV head gets.  [default: for importance head, or layer with "
    "queries=predicted; uniform for the others, and with --cache-groups]",
)
weights_option = _choice("--weights", WeightFormat, "int4", "How ONNX Runtime targets store weights.")


native_option = _choice(
    "--native",
    Native,
    "auto",
    "ONNX Runtime: native operators where scripts/build_native.sh has built them, for certain, or never.",
)
cache_dtype_option = _choice(
    "--cache-dtype", CacheType, "float32", "ONNX Runtime: type of the caches; all but float32 take native operators."
)


threads_option = click.option(
    "--threads", type=click.IntRange(min=1), help="Of whatever computes.  [default: the CPUs that this process may use]"
)


def json_option(help: str = "Print JSON instead of a table.") -> Decorator:
    """Adds `--json`, passed as `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help=help)


def size_option(name: str, help: str) -> Decorator:
    """Adds an option that takes a size such as 2GiB, passed as bytes, or None."""

    def read(ctx: click.Context, option: click.Parameter, text: str | None) -> int | None:
        return None if text is None else parse_size(text, where=name)

    return click.option(name, metavar="SIZE", callback=read, help=help)


def target_option(help: str = "Runtime to use.", *, default: str | None = "onnxruntime-cpu") -> Decorator:
    """Adds `--target`, passed as `target`; the rooms that open, build or lint say which names they take."""
    return click.option("--target", default=default, show_default=True, help=help)


allow_plugins_option = click.option(
    "--allow-plugins", is_flag=True, help="TensorRT: run native code of plugins that the bundle's engines carry."
)


def targets_option(help: str, *, default: Sequence[str] | None = None) -> Decorator:
    """Adds `--target` that may be given several times, passed as `targets`."""
    several = f"{help}; may be given several times." + ("" if default else "  [default: all]")
    return click.option("--target", "targets", multiple=True, default=default, show_default=bool(default), help=several)


_BUDGET_HELP = "Share of cache entries kept (0.2), slots of a layer (1638tokens), or bytes of a row's cache (64MiB)"


def budget_option(default: str) -> Decorator:
    """Adds `--budget`, passed as `budget`: a `Budget`, or None.

    Args:
        default: what None means, for the help.
    """

    def parse(budget: str | None) -> Budget | None:
        from semkv_deploy.budget_units import parse_budget

        return None if budget is None else parse_budget(budget)

    return _group("budget", [click.option("--budget", help=f"{_BUDGET_HELP}.  [default: {default}]")], parse)


def budgets_option(*, required: bool = False, default: Sequence[str] = ()) -> Decorator:
    """Adds `--budget` that may be given several times, passed as `budgets`: empty for all that were built."""

    def parse(budgets: tuple[str, ...]) -> list[Budget]:
        from semkv_deploy.budget_units import parse_budget

        return [parse_budget(budget) for budget in budgets]

    text = f"{_BUDGET_HELP}; may be given several times." + ("" if required or default else "  [default: all]")
    option = click.option(
        "--budget",
        "budgets",
        multiple=True,
        required=required,
        default=list(default) or None,
        show_default=bool(default),
        help=text,
    )
    return _group("budgets", [option], parse)


class _MethodName(click.Choice):
    """One of the registered methods; they are imported when a name is read or listed, not with the command line."""

    def __init__(self) -> None:
        self.case_sensitive = True

    @property
    def choices(self) -> tuple[str, ...]:  # type: ignore[override]
        from semkv_deploy.methods import METHODS

        return tuple(METHODS)


def _parse_method(method: str, method_option: tuple[str, ...], compress_at: str) -> AnyMethod:
    from semkv_deploy.cli.yaml_values import parse
    from semkv_deploy.methods import method_from_options

    values: dict[str, Any] = {"compress_at": compress_at}
    for option in method_option:
        name, separator, value = option.partition("=")
        if not separator:
            raise SemkvError("not of the form name=value", where="--method-option", got=option)
        values[name.replace("-", "_")] = parse(value, f"--method-option {name}")
    return method_from_options(method, values)


method_options = _group(
    "method",
    [
        click.option(
            "--method",
            type=_MethodName(),
            default="importance",
            show_default=True,
            help="Compression method.",
        ),
        click.option(
            "--method-option",
            multiple=True,
            metavar="NAME=VALUE",
            help="Parameter of the method, such as fit=none, queries=predicted, form=paper, recent=0.5, sinks=4.",
        ),
        click.option(
            "--compress-at",
            type=click.Choice(["full", "turn"]),
            default="full",
            show_default=True,
            help="When the cache is full, or at every turn end as well.",
        ),
    ],
    _parse_method,
)


_DTYPES = f"{', '.join(get_args(DType)[:-1])} or {get_args(DType)[-1]}"


def _parse_dtype(dtype: str) -> str:
    if dtype not in get_args(DType):
        eight = dtype in ("int8", "fp8")
        raise SemkvError(
            "TensorRT's in-place append takes no 8-bit cache" if eight else "unknown element type",
            where="--dtype",
            expected=_DTYPES,
            got=dtype,
            fix="use --dtype float16; 8-bit caches are for hosts of the NexusAttention plugin" if eight else None,
        )
    return dtype


dtype_option = _group(
    "dtype",
    [
        click.option(
            "--dtype",
            default="float16",
            show_default=True,
            metavar="TYPE",
            help=f"TensorRT: type of weights and caches: {_DTYPES}.",
        )
    ],
    _parse_dtype,
)

layout_option = _choice(
    "--layout",
    EngineLayout,
    "dual",
    "TensorRT: prefill and decode as two optimization profiles, as one, or as two engines.",
)


def _parse_tensorrt(
    dtype: Any,
    layout: Any,
    batch: int,
    compute_capabilities: str | None,
    plugins: str,
    plugin_library: Path | None,
    memory_limit: int | None,
    engine_cache: Path | None,
    no_engines: bool,
) -> TensorRTOptions:
    from semkv_deploy.targets.tensorrt.build import TensorRTOptions

    return TensorRTOptions(
        dtype=dtype,
        layout=layout,
        batch=batch,
        compute_capabilities=compute_capabilities,
        plugins=tuple(plugins.split(",")),
        plugin_library=plugin_library,
        memory_limit=memory_limit,
        engine_cache=engine_cache,
        engines=not no_engines,
    )


tensorrt_options = _group(
    "tensorrt",
    [
        dtype_option,
        layout_option,
        click.option(
            "--batch", type=click.IntRange(min=1), default=1, show_default=True, help="TensorRT: rows decoded."
        ),
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
        click.option("--plugin-library", type=PATH, help="TensorRT: libsemkv_plugins.so, embedded in engines."),
        size_option("--memory-limit", "TensorRT: workspace of the builder at most, such as 2GiB."),
        click.option("--engine-cache", type=PATH, help="TensorRT: folder of engines to reuse and add to."),
        click.option("--no-engines", is_flag=True, help="TensorRT: write the graphs and contracts, build no engine."),
    ],
    _parse_tensorrt,
)


def _parse_serving(
    rows: int,
    threads: int | None,
    idle_seconds: float,
    wait_seconds: float,
    max_waiting: int,
    max_sessions: int,
    max_tokens: int | None,
    save_sessions: Path | None,
    share_sessions: bool,
) -> ServingOptions:
    from semkv_deploy.serve.options import ServingOptions

    return ServingOptions(
        rows=rows,
        threads=threads,
        idle_seconds=idle_seconds,
        wait_seconds=wait_seconds,
        max_waiting=max_waiting,
        max_sessions=max_sessions,
        max_tokens=max_tokens,
        save_sessions=save_sessions,
        share_sessions=share_sessions,
    )


class _Number(click.FloatRange):
    """A range of numbers; what is no number is in none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if number != number:
            self.fail(f"{value} is not a number", param, ctx)
        return number


def _at_least(name: str, least: int, default: float, help: str) -> Decorator:
    kind = click.IntRange(min=least) if isinstance(default, int) else _Number(min=least)
    return click.option(name, type=kind, default=default, show_default=True, help=help)


serving_options = _group(
    "serving",
    [
        _at_least("--rows", 1, 4, "Sessions that have caches at one time."),
        threads_option,
        _at_least("--idle-seconds", 0, 600.0, "How long an idle session keeps its row."),
        _at_least("--wait-seconds", 0, 30.0, "How long a request waits for a row."),
        _at_least("--max-waiting", 1, 256, "Most requests that wait."),
        _at_least("--max-sessions", 1, 1024, "Most sessions, saved ones included."),
        click.option("--max-tokens", type=click.IntRange(min=1), help="Most tokens of a reply.  [default: context]"),
        click.option(
            "--save-sessions", type=PATH, metavar="FOLDER", help="Save idle sessions there instead of forgetting them."
        ),
        click.option(
            "--share-sessions",
            is_flag=True,
            help="Save every turn, and share the folder with other servers: each goes on with any session.",
        ),
    ],
    _parse_serving,
)
