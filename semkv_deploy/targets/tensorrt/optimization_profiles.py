"""Checks optimization profiles against a network's inputs: TensorRT's own words for a bad one name neither."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from semkv_deploy.errors import SemkvError

Shape = tuple[int, ...]


def check_profiles(
    inputs: Mapping[str, Shape], profiles: Sequence[Mapping[str, tuple[Shape, Shape, Shape]]], where: str
) -> None:
    """Compares profiles with the network's inputs, of which -1 is a dynamic size.

    Raises:
        SemkvError: for a dynamic input without shapes, an unknown input, or shapes that do not fit or ascend.
    """
    dynamic = [name for name, shape in inputs.items() if -1 in shape]
    if dynamic and not profiles:
        raise SemkvError(
            f"input {dynamic[0]} is dynamic and there is no optimization profile",
            where=where,
            got=inputs[dynamic[0]],
            fix="give its smallest, usual and largest shape, or make it static",
        )
    for number, profile in enumerate(profiles):
        place = f"{where}, profile {number}"
        for name in dynamic:
            if name not in profile:
                raise SemkvError(f"no shapes for dynamic input {name}", where=place, expected=inputs[name])
        for name, shapes in profile.items():
            if name not in inputs:
                raise SemkvError(f"no input {name}", where=place, expected=" or ".join(dynamic) or "no dynamic inputs")
            for shape in shapes:
                fits = len(shape) == len(inputs[name])
                if not fits or any(b not in (-1, s) for s, b in zip(shape, inputs[name], strict=True)):
                    raise SemkvError(
                        f"shape does not fit input {name}", where=place, expected=inputs[name], got=tuple(shape)
                    )
            if not all(low <= usual <= high for low, usual, high in zip(*shapes, strict=True)):
                raise SemkvError(
                    f"shapes of input {name} do not ascend",
                    where=place,
                    expected="smallest <= usual <= largest",
                    got=", ".join(map(str, shapes)),
                )
