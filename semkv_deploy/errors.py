"""The one error a user sees: what went wrong, where, what was expected, what was found, and what to do about it."""

from __future__ import annotations


class SemkvError(Exception):
    """A failure the user can act on.

    Args:
        what: one clause, no full stop: what went wrong.
        where: the file, option, layer or operator it concerns.
        expected, got: what the contract asks for and what was found.
        fix: what to do next, as an imperative clause.
    """

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        expected: object = None,
        got: object = None,
        fix: str | None = None,
    ) -> None:
        self.what, self.where, self.expected, self.got, self.fix = what, where, expected, got, fix
        text = f"{where}: {what}" if where is not None else what
        details = [f"{name} {value}" for name, value in (("expected", expected), ("got", got)) if value is not None]
        if details:
            text += " (" + ", ".join(details) + ")"
        if fix:
            text += f". {fix[0].upper()}{fix[1:]}"
        super().__init__(text + ".")
