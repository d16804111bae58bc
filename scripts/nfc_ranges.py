"""Prints plugins/runtime/text/nfc_ranges.inc: which code points Unicode's form NFC may change, and which have an order.

python scripts/nfc_ranges.py > plugins/runtime/text/nfc_ranges.inc
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator

HANGUL_VOWELS, HANGUL_ENDS = range(0x1161, 0x1176), range(0x11A8, 0x11C3)
"""They join the one before them by rule, and are in no table of Unicode's."""


def seconds() -> set[int]:
    """Code points that may become one with what stands before them."""
    found = {*HANGUL_VOWELS, *HANGUL_ENDS}
    for code in range(0x110000):
        parts = unicodedata.decomposition(chr(code)).split()
        if len(parts) == 2 and "<" not in parts[0] and unicodedata.normalize("NFC", chr(code)) == chr(code):
            found.add(int(parts[1], 16))
    return found


def ranges() -> Iterator[tuple[int, int, int, bool]]:
    """First and last code point, combining class, whether the form may change them; none with neither."""
    joining, last = seconds(), (0, -1, 0, False)
    for code in range(0x110001):
        kind = (0, False)
        if code < 0x110000 and not 0xD800 <= code < 0xE000:
            changes = code in joining or unicodedata.normalize("NFC", chr(code)) != chr(code)
            kind = (unicodedata.combining(chr(code)), changes)
        if (code, *kind) == (last[1] + 1, *last[2:]):
            last = (last[0], code, *kind)
            continue
        if last[2:] != (0, False):
            yield last
        last = (code, code, *kind)


def main() -> None:
    version = unicodedata.unidata_version
    print(f"// Unicode {version}, by scripts/nfc_ranges.py: first, last, class, whether NFC may change it.")
    entries = [f"{{{first:#x}, {last:#x}, {order}, {int(changes)}}}," for first, last, order, changes in ranges()]
    for at in range(0, len(entries), 4):
        print(" ".join(entries[at : at + 4]))


if __name__ == "__main__":
    main()
