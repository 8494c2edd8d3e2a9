"""Numbers as people read them: a prefix that suits the unit, and no more digits than the interval supports.

>>> interval(0.00123, 0.00119, 0.00127, "s/token")
('1.230 ms', '[1.190, 1.270]')
"""

from __future__ import annotations

import math

_LARGE = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_TIME = ((7200.0, 3600.0, "h"), (120.0, 60.0, "min"), (1.0, 1.0, "s"), (1e-3, 1e-3, "ms"), (1e-6, 1e-6, "µs"))
_ENERGY = ((1.0, 1.0, "J"), (1e-3, 1e-3, "mJ"), (1e-6, 1e-6, "µJ"))
_PREFIXED = {
    "B": "B",
    "B/s": "B/s",
    "FLOP": "FLOP",
    "FLOP/B": "",
    "FLOP/s": "FLOP/s",
    "FLOP/token": "",
    "parameter": "",
    "step": "",
    "token": "",
    "token/s": "/s",
}
_PLAIN_DIGITS = 3
_MOST_DIGITS = 5
_SHORTEST_CLAUSE = 12


def scale(value: float, unit: str) -> tuple[float, str]:
    """What to divide by, and the unit to print: (1e-3, "ms") for 0.004 s."""
    size = abs(value)
    if unit in ("s", "s/token"):
        for least, factor, name in _TIME:
            if size >= least:
                return factor, name
        return (1e-9, "ns") if size > 0 else (1.0, "s")
    if unit == "J/token" and size > 0:
        return next(((factor, name) for least, factor, name in _ENERGY if size >= least), (1e-9, "nJ"))
    if unit == "fraction":
        return 0.01, "%"
    if unit in _PREFIXED:
        for factor, prefix in _LARGE:
            if size >= factor * 0.9995:
                return factor, prefix + _PREFIXED[unit]
        return 1.0, _PREFIXED[unit]
    return 1.0, ""


def _decimals(value: float, half_width: float | None) -> int:
    """Two digits of the half width, never more than five of the value; three of the value without an interval."""
    leading = math.floor(math.log10(abs(value))) if value else 0
    if half_width is None or half_width <= 0:
        return max(0, _PLAIN_DIGITS - 1 - leading)
    wanted = 1 - math.floor(math.log10(half_width))
    return max(0, min(wanted, _MOST_DIGITS - 1 - leading))


def plain(value: float, unit: str = "") -> str:
    """The number alone, three digits: `1.23 M`, `4.1 ms`. Whole numbers below a thousand stay whole."""
    return interval(value, None, None, unit)[0]


def interval(value: float, low: float | None, high: float | None, unit: str = "") -> tuple[str, str]:
    """The number with its unit, and `[low, high]` in the same unit ("" without an interval)."""
    factor, name = scale(value, unit)
    shown = value / factor
    suffix = f" {name}" if name else ""
    if low is None or high is None:
        whole = shown == round(shown) and abs(shown) < 1000
        return f"{shown:.{0 if whole else _decimals(shown, None)}f}{suffix}", ""
    digits = _decimals(shown, (high - low) / factor / 2)
    return f"{shown:.{digits}f}{suffix}", f"[{low / factor:.{digits}f}, {high / factor:.{digits}f}]"


def percent(fraction: float, signed: bool = False) -> str:
    """`+1.3 %`; one decimal below ten per cent, none above."""
    value = fraction * 100
    digits = 1 if abs(value) < 9.95 else 0
    text = f"{value:{'+' if signed else ''}.{digits}f}"
    return f"{'0.0' if float(text) == 0 else text} %".replace("-", "\N{MINUS SIGN}")


def share(fraction: float) -> str:
    """`5 %`: a round share, without needless decimals."""
    return f"{100 * fraction:g} %"


def ratio(value: float) -> str:
    """`×12`, for deviations too large to be read in per cent."""
    return f"×{value:.{max(0, 1 - math.floor(math.log10(value)))}f}"


def tokens(count: float) -> str:
    """Contexts in the field's way: 256, 1K (1024), 1.3K, 128K, 1M."""
    for size, suffix in ((2**20, "M"), (2**10, "K")):
        if count >= size:
            scaled = count / size
            return f"{scaled:.0f}{suffix}" if scaled == round(scaled) or scaled >= 100 else f"{scaled:.1f}{suffix}"
    return f"{count:.0f}"


def shorten(reason: str, width: int = 48) -> str:
    """The first clause of a reason, cut at a word."""
    clause = reason.strip().split("\n")[0]
    for mark in ("; ", ". "):
        clause = clause.split(mark)[0]
    for mark in (" (", ": "):
        head = clause.split(mark)[0]
        if len(clause) > width and len(head) >= _SHORTEST_CLAUSE:
            clause = head
    if len(clause) <= width:
        return clause or "no reason given"
    return clause[: width - 1].rsplit(" ", 1)[0].rstrip(",;:") + " …"


def listed(items: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
