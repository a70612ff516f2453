# SPDX-License-Identifier: GPL-2.0-or-later
"""Bytes, times and counts as people write and read them. Pure; no Textual."""

from __future__ import annotations

import re
import time

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")

# A bare letter is a power of 1024, as in every disk tool; the decimal units are spelled out.
_FACTORS: dict[str, int] = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGTPE", start=1):
    _FACTORS[_letter] = _FACTORS[f"{_letter}iB"] = 1024**_power
    _FACTORS[f"{_letter}B"] = 1000**_power

_SIZE = re.compile(r"(?P<number>[0-9]+(?:\.[0-9]+)?)\s*(?P<unit>[A-Za-z]*)")

MAX_SIZE = (1 << 64) - 1


def parse_size(text: str) -> int:
    """
    Read a size such as `4096`, `10G`, `512MiB`, `1.5TiB` or `2GB` and give it in bytes.

    K, M, G … and KiB, MiB, GiB … are powers of 1024; kB is no unit, KB, MB, GB … are powers of 1000. Raises
    ValueError whose text names what is wrong.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a size: write a number and a unit, such as 10G or 512MiB")
    number, unit = match["number"], match["unit"]
    if unit not in _FACTORS:
        raise ValueError(f"{unit!r} in {text!r} is not a unit: use K, M, G, T, P, E, KiB … EiB, or KB … EB")
    whole, _, fraction = number.partition(".")
    divisor = int("1" + "0" * len(fraction))
    scaled, rest = divmod(int(whole + fraction) * _FACTORS[unit], divisor)
    if rest:
        raise ValueError(f"{text!r} is not a whole number of bytes")
    if scaled > MAX_SIZE:
        raise ValueError(f"{text!r} is more than 64 bits can hold")
    return scaled


def format_size(size_bytes: float) -> str:
    """Write a size with three significant digits and a unit: `1.00 GiB`, `43.7 MiB`, `512 B`."""
    value, unit = float(size_bytes), _UNITS[0]
    for unit in _UNITS:
        # What would be printed as 1000 or more reads better in the next unit, but bytes stay whole.
        if value < (1000 if unit != "B" else 1024) or unit == _UNITS[-1]:
            break
        value /= 1024
    if unit == "B":
        return f"{value:.0f} B"
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f} {unit}"


def format_count(count: int) -> str:
    """Write a number with thin groups: `16 777 216`."""
    return f"{count:,}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def format_share(part: float, whole: float) -> str:
    """Write a share: `0 %`, `<0.1 %`, `3.4 %`, `100 %`; `-` of nothing."""
    if whole <= 0:
        return "-"
    percent = 100 * part / whole
    if percent == 0 or percent >= 99.95:
        return f"{percent:.0f} %"
    return "<0.1 %" if percent < 0.1 else f"{percent:.1f} %"


def format_time(time_us: int, *, now_us: int | None = None) -> str:
    """Write a moment in local time, without the date when it was within the last day; `-` for 0."""
    if time_us <= 0:
        return "-"
    now = time.time_ns() // 1000 if now_us is None else now_us
    shape = "%H:%M:%S" if 0 <= now - time_us < 86_400_000_000 else "%Y-%m-%d %H:%M"
    return time.strftime(shape, time.localtime(time_us / 1_000_000))


def format_age(seconds: float) -> str:
    """Write how long ago something was, in one unit: `now`, `5 s`, `3 min`, `2 h`, `4 d`."""
    if seconds < 1:
        return "now"
    for length, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def parse_place(text: str, *, capacity: int, block_size: int, sector_size: int) -> int:
    """
    Read a place on a device and give its block: an offset (`12G`), `b123` (block), `s2048` (sector) or `50%`.

    Raises ValueError whose text names what is wrong.
    """
    kind, rest = text[:1].lower(), text[1:].strip()
    if not text:
        raise ValueError("write an offset such as 12G, b123 for a block, s2048 for a sector, or 50%")
    if kind in ("b", "s"):
        if not (rest.isascii() and rest.isdigit()):
            raise ValueError(f"{text!r} is not a {'block' if kind == 'b' else 'sector'}: write {kind}123")
        offset = int(rest) * (block_size if kind == "b" else sector_size)
    elif text.endswith("%"):
        share = text[:-1].strip()
        if not re.fullmatch(r"[0-9]+(\.[0-9]+)?", share) or float(share) > 100:
            raise ValueError(f"{text!r} is not a share: write 0% to 100%")
        offset = min(int(float(share) * capacity / 100), capacity - 1)
    else:
        offset = parse_size(text)
    if offset >= capacity:
        raise ValueError(f"{text} is past the end: the device has {format_size(capacity)}")
    return offset // block_size


def parse_range(text: str, capacity: int) -> tuple[int, int]:
    """Read `OFFSET:LENGTH` inside a device of `capacity` bytes. Raises ValueError whose text names what is wrong."""
    start, colon, length = text.partition(":")
    if not colon:
        raise ValueError(f"{text!r} is not OFFSET:LENGTH, such as 12G:64K")
    pair = parse_size(start), parse_size(length)
    if not pair[1]:
        raise ValueError(f"{text!r} is empty")
    if sum(pair) > capacity:
        raise ValueError(f"{text} reaches past the end: the device has {format_size(capacity)}")
    return pair
