"""Native code that a bundle carries: plugins in its engines. It runs only when the caller says so."""

from __future__ import annotations

from collections.abc import Sequence

from semkv_deploy.errors import SemkvError


def check_native_code(plugins: Sequence[str], *, allowed: bool, where: object) -> None:
    """Fails where engines hold the code of plugins and the caller has not allowed it.

    The manifest's word is no permission: whoever wrote the bundle wrote it. An engine whose manifest is silent about
    its plugins is refused by TensorRT itself, which is told to run no code that an engine brings.

    Raises:
        SemkvError: naming the plugins and how to allow them.
    """
    if plugins and not allowed:
        raise SemkvError(
            "its engines carry native code, which runs with all your rights",
            where=where,
            got=f"plugins {', '.join(plugins)}",
            fix="give --allow-plugins (in Python: allow_plugins=True) if you trust who built the bundle",
        )
