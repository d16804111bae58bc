"""The report as one table of text."""

from __future__ import annotations

from typing import Any

DECODE = ("heads", "batch", "slots", "bytes", "floor_ms_1", "ms_1", "share_1", "ms_0.5", "share_0.5", "ms_0.2")
DECODE += ("share_0.2", "ms_flash", "speedup_1", "speedup_0.5", "speedup_0.2", "ms_flashinfer")
KERNELS = ("kernel", "bytes", "floor_ms", "ms", "share", "share_of_prefill")


def cell(value: Any) -> str:
    """A number with four digits, anything else as it is; what is missing as "-"."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def lines(columns: tuple[str, ...], rows: list[dict[str, Any]]) -> list[str]:
    """Columns as wide as they need; the reason behind a row that was not measured or failed."""
    cells = [list(columns)] + [[cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    text = ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in cells]
    reasons = [""] + [str(row.get("failed") or row.get("not_measured") or "") for row in rows]
    return [f"{line}  {reason}".rstrip() for line, reason in zip(text, reasons, strict=True)]


def table(data: dict[str, Any]) -> str:
    """The measured copy bandwidth; each kernel's bytes, floor and share of it; every decode step beside the others'."""
    copies = ", ".join(f"{name} {cell(value)}" for name, value in data.get("copies_gb_s", {}).items())
    text = [f"{data['device']}: measured copy bandwidth {cell(data.get('copy_gb_s'))} GB/s ({copies or 'no copy'})"]
    text += ["floor: the bytes a kernel must move at that bandwidth; share: floor over time; speedup: over flash"]
    kernels = [{"kernel": name} | values for name, values in data.get("kernels", {}).items()]
    text += ["", *lines(KERNELS, kernels), "", "NexusAttention decode:", *lines(DECODE, data.get("decode", []))]
    return "\n".join(text)
