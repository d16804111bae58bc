"""Cases of the sizes that count: several splits and waves, offsets beyond 4 GiB, clusters over 512 words; ragged, and
against torch in float32 on the device itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import bindings
import nexus_cases
import numpy as np
import timing
import torch

from semkv_deploy.ops import nexus_attention


@dataclass(frozen=True)
class Attention:
    """One large case of NexusAttention: sizes, element type, options ("int8", "fp8", "indexed", "mass"), attributes."""

    heads: tuple[int, int, int]
    batch: int
    rows: int
    slots: int
    dtype: torch.dtype
    options: tuple[str, ...] = ()
    attributes: tuple[tuple[str, float], ...] = ()

    def name(self) -> str:
        """As it is printed: query heads / KV heads x head size, batch, slots, type, options."""
        heads = "{}/{}x{}".format(*self.heads)
        words = (heads, f"batch {self.batch}", f"{self.rows} rows", f"{self.slots} slots", str(self.dtype)[6:])
        return " ".join(("NexusAttention", *words, *self.options, *(f"{k}={v:g}" for k, v in self.attributes)))


ATTENTION = (
    Attention((32, 8, 128), 5, 1, 8192, torch.float16),
    Attention((9, 3, 64), 3, 3, 33_000, torch.bfloat16),
    Attention((32, 8, 128), 3, 1, 33_000, torch.float16, ("indexed", "int8", "mass")),
    Attention((8, 2, 80), 2, 1, 131_072, torch.float32, (), (("window", 4096),)),
    Attention((16, 8, 256), 2, 5, 8192, torch.float16, (), (("softcap", 20.0), ("causal", 0))),
    Attention((12, 4, 96), 9, 1, 33_000, torch.bfloat16, ("fp8",)),
    Attention((28, 4, 128), 3, 1, 131_072, torch.bfloat16, ("mass",)),
    # Each cache is 6 GiB and 3 * 2**30 elements: 32-bit offsets fail.
    Attention((32, 8, 128), 24, 1, 131_072, torch.float16),
)
SMALL_ATTENTION = (
    Attention((4, 2, 64), 3, 1, 96, torch.float16),
    Attention((4, 2, 64), 2, 2, 96, torch.float32, ("indexed", "int8", "mass"), (("window", 40),)),
    Attention((4, 2, 96), 2, 1, 96, torch.bfloat16, ("fp8",)),
)


def ragged(batch: int, longest: int) -> list[int]:
    """Lengths from 0 to `longest`: both, one less, and odd ones between them; the longest last, farthest in memory."""
    between = [longest * (i + 1) // batch | 1 for i in range(batch)]
    lengths = [0, longest - 1, *between][: batch - 1]
    return [*(min(n, longest) for n in lengths), longest]


def attention_inputs(
    case: Attention, device: torch.device
) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor], dict[str, Any]]:
    """Inputs, optional inputs by name and attributes (mass=True where asked for)."""
    torch.manual_seed(0)
    query_heads, kv_heads, head_size = case.heads
    shape = (case.batch, kv_heads, case.slots, head_size)
    query = torch.randn(case.batch, query_heads, case.rows, head_size, device=device).mul(2).to(case.dtype)
    new = [torch.randn(case.batch, kv_heads, case.rows, head_size, device=device).to(case.dtype) for _ in range(2)]
    bias = torch.randint(1, 9, shape[:3], device=device).float().log()
    bias[torch.rand(shape[:3], device=device) < 0.1] = -torch.inf
    lengths = ragged(case.batch, case.slots - case.rows)
    options: dict[str, torch.Tensor] = {}
    caches = []
    for name in ("key_scale", "value_scale"):
        cache = torch.randn(shape, dtype=case.dtype, device=device)
        for code in {"int8", "fp8"} & set(case.options):
            cache, options[name] = nexus_attention.quantize(cache, code)
        caches.append(cache)
    if "indexed" in case.options:
        index = torch.full((*shape[:2], case.slots // 5), -1, dtype=torch.int64, device=device)
        for b, length in enumerate(lengths):
            named = min(length, index.shape[2] - 1)
            # From the second entry on: the first names nothing.
            index[b, :, 1 : 1 + named] = torch.rand(kv_heads, length, device=device).argsort(-1)[:, :named]
        options["slot_index"] = index
    inputs = (query, *new, *caches, bias, torch.tensor(lengths, device=device))
    return inputs, options, dict(case.attributes) | {"mass": "mass" in case.options}


def attention_row(
    inputs: Sequence[torch.Tensor], options: dict[str, torch.Tensor], attributes: dict[str, Any], row: int
) -> tuple[torch.Tensor, ...]:
    """The reference's outputs for one batch row, computed in float32 on the inputs' device; caches up to the live end.

    Caches and scales may already hold the new rows: writing them again changes nothing.
    """
    end = int(inputs[6][row]) + inputs[0].shape[2]

    def part(tensor: torch.Tensor, live: bool) -> torch.Tensor:
        tensor = tensor[row : row + 1, :, :end] if live else tensor[row : row + 1]
        return tensor.float() if tensor.dtype in nexus_cases.DTYPES else tensor

    parts = [part(t, live=i in (3, 4, 5)) for i, t in enumerate(inputs)]
    given = {name: part(t, live=name != "slot_index") for name, t in options.items()}
    attributes = {k: int(v) if k in ("causal", "window") else v for k, v in attributes.items()}
    return nexus_attention.reference(*parts, **given, **attributes)


def compare_row(
    got: Sequence[torch.Tensor], want: Sequence[torch.Tensor], row: int, start: int, mass: bool
) -> tuple[float, list[str]]:
    """Error of one batch row's output and what is wrong with it; `start`: the row's length.

    The output and the mass within their tolerances, the appended rows of caches and scales bit for bit.
    """
    wrong = []
    error = nexus_cases.relative_error(got[0][row : row + 1], want[0])
    if error > nexus_cases.TOLERANCE[got[0].dtype]:
        wrong.append(f"output {error:.2e}")
    for i, (mine, theirs) in enumerate(zip(got[1:], want[1:], strict=True)):
        end = theirs.shape[2]
        if mass and i == len(got) - 2:
            if (difference := nexus_cases.relative_error(mine[row : row + 1, :, :end], theirs)) > 1e-4:
                wrong.append(f"mass {difference:.2e}")
            if bool((mine[row, :, end:] != 0).any()):
                wrong.append("mass of dead slots is not 0")
        elif not torch.equal(mine[row, :, start:end].float(), theirs[0, :, start:].float()):
            wrong.append(f"appended rows of cache {i}")
    return error, [f"row {row} of {start} slots: {w}" for w in wrong]


def attention(kernels: bindings.Kernels, device: torch.device, case: Attention) -> dict[str, Any]:
    """Runs one case. Raises torch's OutOfMemoryError where it does not fit."""
    inputs, options, attributes = attention_inputs(case, device)
    prepared = bindings.prepare_nexus_attention(kernels, inputs, options, **attributes)
    before = [t[:, :, :8].clone() for t in inputs[3:5]]
    prepared()
    failures = []
    worst = 0.0
    for row, start in enumerate(inputs[6].tolist()):
        want = attention_row(inputs, options, attributes, row)
        error, wrong = compare_row(prepared.outputs, want, row, start, attributes["mass"])
        worst = max(worst, error)
        failures += wrong
        old = min(start, 8)
        for i, t in enumerate(inputs[3:5]):
            if not torch.equal(t[row, :, :old].float(), before[i][row, :, :old].float()):
                failures.append(f"row {row}: cache {i} changed where it should not")
    return {"case": case.name(), "relative_error": worst, "failures": failures}


def cluster_inputs(
    slots: int, heads: int, head_size: int, levels: int, device: torch.device
) -> tuple[torch.Tensor, ...]:
    """One layer in float16, in runs of 1 to 16 slots around one direction each, chunks of 1 to 64 slots, random sizes.

    Slots of one direction have a cosine of about 0.97, others' is about 0: no decision hangs on a rounding error.
    """
    draw = torch.Generator().manual_seed(0)
    runs = torch.randint(1, 17, (slots,), generator=draw)
    kind = torch.repeat_interleave(torch.arange(slots), runs)[:slots].to(device)
    torch.manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(int(kind.max()) + 1, head_size, device=device), dim=-1)
    shape = (1, heads, slots, head_size)
    keys = directions[kind] + 0.25 / head_size**0.5 * torch.randn(shape, device=device)
    keys = keys * (1 + 3 * torch.rand(1, heads, slots, 1, device=device))
    values = torch.randn(shape, device=device)
    sizes = torch.randint(1, 65, (slots,), generator=draw)
    chunk = torch.repeat_interleave(torch.arange(slots), sizes)[:slots].to(device)
    # Level l closes 1 / 2**(levels - 1 - l) of the chunks' boundaries, so later levels merge more.
    chunks = torch.stack([chunk >> level for level in range(levels)])[None, None]
    bias = torch.randint(1, 5, (slots,), generator=draw).float().log()
    bias[::97] = -torch.inf
    bias = bias.to(device).expand(1, heads, slots).contiguous()
    length = torch.tensor([slots - 5], device=device)
    thresholds = torch.full((levels,), 0.5, device=device)
    # Less than the first level's clusters: another level has to be taken.
    target = torch.tensor([slots // 8], device=device)
    return keys.half(), values.half(), bias, length, chunks.contiguous(), thresholds, target


def cluster_seeds(inputs: Sequence[torch.Tensor], span: int, level: int) -> np.ndarray:
    """[length] the seed each slot belongs to, -1 where it is dead: the contract's greedy rule at one level, one slot at
    a time on the host, with all cosines from float32 products on the device. Batch row 0, one group."""
    keys, _, bias, length, chunk_id, thresholds, _ = inputs
    used = int(length[0])
    unit = torch.nn.functional.normalize(keys[0, :, :used].float(), dim=-1, eps=1e-12)
    near = torch.full((used, span), -2.0, device=keys.device)
    for back in range(1, min(span, used)):
        near[back:, back] = (unit[:, back:] * unit[:, :-back]).sum(-1).mean(0)
    joins = (near > thresholds[level]).cpu().numpy()
    chunk = chunk_id[0, 0, level, :used].cpu().numpy()
    live = (bias[0, 0, :used] > -torch.inf).cpu().numpy()
    owner = np.full(used, -1, dtype=np.int64)
    is_seed = np.zeros(used, dtype=bool)
    for slot in range(used):
        if not live[slot]:
            continue
        first = max(0, slot - span + 1)
        tried = np.arange(first, slot)
        fits = is_seed[first:slot] & joins[slot, slot - tried] & (chunk[first:slot] == chunk[slot]) & (chunk[slot] >= 0)
        owner[slot] = tried[fits.argmax()] if fits.any() else slot
        is_seed[slot] = owner[slot] == slot
    return owner


def cluster_failures(inputs: Sequence[torch.Tensor], got: Sequence[torch.Tensor], span: int) -> list[str]:
    """What is wrong with the outputs of SemanticCluster for batch row 0 of inputs with one group."""
    keys, values, bias, _, chunk_id, _, target = inputs
    slots, levels = keys.shape[2], chunk_id.shape[2]
    for level in range(levels):
        owner = cluster_seeds(inputs, span, level)
        seeds = np.unique(owner[owner >= 0])
        if len(seeds) <= int(target[0]):
            break
    wrong = []
    if int(got[3][0]) != len(seeds) or int(got[5][0]) != level:
        return [f"length and level {int(got[3][0])}, {int(got[5][0])}, expected {len(seeds)}, {level}"]
    sources = torch.full((slots,), -1, dtype=torch.int64)
    sources[: len(seeds)] = torch.from_numpy(seeds)
    if not torch.equal(got[4][0, 0].cpu(), sources):
        wrong.append("chosen slots")
    member = torch.from_numpy(np.flatnonzero(owner >= 0)).to(keys.device)
    place = torch.from_numpy(np.searchsorted(seeds, owner[owner >= 0])).to(keys.device)
    weight = bias[0, 0, member].exp()
    total = torch.zeros(slots, device=keys.device).index_add_(0, place, weight)
    for name, tensor, out in (("keys", keys, got[0]), ("values", values, got[1])):
        rows = tensor[0][:, member].float() * (weight / total[place])[:, None]
        want = torch.zeros(tensor.shape[1:], device=keys.device).index_add_(1, place, rows)
        if (error := nexus_cases.relative_error(out[0], want)) > nexus_cases.TOLERANCE[keys.dtype]:
            wrong.append(f"{name} {error:.2e}")
    want_bias = torch.where(total > 0, total.log(), 0.0)
    if not torch.allclose(got[2][0], want_bias.expand_as(got[2][0]), rtol=1e-5, atol=1e-5):
        wrong.append("biases")
    return wrong


def cluster(kernels: bindings.Kernels, device: torch.device, slots: int) -> dict[str, Any]:
    """One level over a whole layer of 8 heads of 128 in one group, in place and not."""
    inputs = cluster_inputs(slots, 8, 128, 1, device)
    failures = []
    for in_place in (False, True):
        got = bindings.semantic_cluster(kernels, inputs, 64, in_place)
        failures += [f"in place {in_place}: {w}" for w in cluster_failures(inputs, got, 64)]
    return {"case": f"SemanticCluster {slots} slots", "length": int(got[3][0]), "failures": failures}


def compact(kernels: bindings.Kernels, device: torch.device, slots: int) -> dict[str, Any]:
    """A whole layer of 8 heads of 128, in place: ascending in one head's group, shuffled in the next."""
    torch.manual_seed(0)
    keys, values = (torch.randn(1, 8, slots, 128, device=device).half() for _ in range(2))
    bias = torch.randn(1, 8, slots, device=device)
    keep = torch.full((1, 8, slots), -1, dtype=torch.int64, device=device)
    wrong = []
    chosen = []
    for head in range(8):
        order = torch.randperm(slots, device=device)[: slots // 5 + head]
        chosen.append(order if head % 2 else order.sort()[0])
        keep[0, head, head : head + len(order)] = chosen[-1]
    got = bindings.compact_cache(kernels, (keys, values, bias, keep), True)
    length = max(len(order) for order in chosen)
    if int(got[3][0]) != length:
        wrong.append(f"length {int(got[3][0])}, expected {length}")
    for head, order in enumerate(chosen):
        for name, tensor, out in (("keys", keys, got[0]), ("values", values, got[1])):
            right = torch.equal(out[0, head, : len(order)], tensor[0, head, order])
            if not right or bool((out[0, head, len(order) :] != 0).any()):
                wrong.append(f"{name} of head {head}")
        end = [-torch.inf] * (length - len(order)) + [0.0] * (slots - length)
        if not torch.equal(got[2][0, head], torch.cat([bias[0, head, order], torch.tensor(end, device=device)])):
            wrong.append(f"biases of head {head}")
    return {"case": f"CompactCache {slots} slots", "failures": wrong}


def block_map(kernels: bindings.Kernels, device: torch.device, slots: int) -> dict[str, Any]:
    """SemanticBlockMap over a whole layer in blocks of 1 to 40 slots, against torch's minimum and maximum."""
    torch.manual_seed(0)
    keys = torch.randn(1, 8, slots, 128, device=device).half()
    lengths = torch.randint(1, 41, (1, max(1, slots // 42)), device=device)
    starts = lengths.cumsum(-1) - lengths
    vectors, table = bindings.semantic_block_map(kernels, (keys, starts, lengths), 2, 40)
    at = starts[0, :, None] + torch.minimum(torch.arange(40, device=device), lengths[0, :, None] - 1)
    rows = keys[0][:, at]
    inside = torch.arange(40, device=device) < lengths[0, :, None]
    wrong = []
    if not torch.equal(vectors[0], torch.stack([rows.amin(2), rows.amax(2)], dim=2)):
        wrong.append("representatives")
    if not torch.equal(table[0], torch.where(inside, at, -1)):
        wrong.append("slots")
    return {"case": f"SemanticBlockMap {slots} slots", "blocks": lengths.shape[1], "failures": wrong}


def needs(case: Attention) -> int:
    """Bytes of a case's caches and of one batch row of them in float32, several times over: what must be free."""
    _, kv_heads, head_size = case.heads
    row = kv_heads * case.slots * head_size
    return 2 * case.batch * row * case.dtype.itemsize * (3 if case.options else 1) + 6 * row * 4 + (1 << 30)


def enough_memory(case: Attention, device: torch.device) -> bool:
    """Whether a case fits what is free now."""
    return not timing.on_gpu(device) or timing.free_bytes(device) > needs(case)
