"""A comparison as GitHub-flavoured Markdown: one table of what needs eyes, and what is equal in a line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from archbench.gate.verdict import HEADLINES, Comparison, Finding

MARK = "<!-- archbench gate -->"
"""By which a workflow finds its own comment again."""
MOST_ROWS = 60

TIERS = {0: "ledger", 1: "quality", 2: "time", 3: "history"}
COLUMNS = ("tier", "cell", "quantity", "verdict", "baseline", "now", "change", "interval", "margin", "detectable")


def document(comparison: Comparison) -> str:
    return "\n".join(_lines(comparison)) + "\n"


def _lines(comparison: Comparison) -> Iterator[str]:
    yield MARK
    yield f"## {comparison.title}: {HEADLINES[comparison.exit_code]}"
    yield ""
    yield summary(comparison)
    yield ""
    shown = remarkable(comparison)
    yield from _table(shown[:MOST_ROWS])
    if len(shown) > MOST_ROWS:
        yield f"... and {len(shown) - MOST_ROWS} more."
        yield ""
    if any(finding.verdict == "changed" and finding.blocks(comparison.fail_on) for finding in comparison.findings):
        yield (
            "What changed on purpose is acknowledged by rewriting the baseline in the same commit: "
            "`archbench gate --accept`."
        )
        yield ""
    if comparison.acknowledged:
        yield f"<details><summary>Acknowledged in the baseline file: {len(comparison.acknowledged)}</summary>"
        yield ""
        yield from _table(comparison.acknowledged[:MOST_ROWS])
        yield "</details>"
        yield ""
    for note in comparison.notes:
        yield f"- {_safe(note)}"


def summary(comparison: Comparison) -> str:
    """`ledger: 120 same, 1 changed; quality: 20 same`."""
    tiers = [
        f"{TIERS[tier]}: {', '.join(f'{n} {verdict}' for verdict, n in sorted(counts.items()))}"
        for tier, counts in comparison.counts.items()
    ]
    return "; ".join(tiers) or "nothing was compared"


def remarkable(comparison: Comparison) -> list[Finding]:
    """What a reader must see: all times, and of the rest what is neither the same, nor fine, nor new."""
    unremarkable = ("same", "fine", "new")
    return [finding for finding in comparison.findings if finding.tier == 2 or finding.verdict not in unremarkable]


def row(finding: Finding) -> tuple[str, ...]:
    """A finding as text, in the order of COLUMNS."""
    low, high = finding.low, finding.high
    interval = "" if low is None or high is None else f"{_difference(low, finding)} to {_difference(high, finding)}"
    return (
        TIERS[finding.tier],
        finding.cell,
        finding.quantity,
        finding.verdict,
        _number(finding.baseline),
        _number(finding.current),
        "" if finding.change is None else f"{100 * finding.change:+.3g} %",
        interval,
        "" if finding.margin is None else _difference(finding.margin, finding),
        "" if finding.detectable is None else _difference(finding.detectable, finding),
    )


def _table(findings: Sequence[Finding]) -> Iterator[str]:
    if not findings:
        return
    yield f"| {' | '.join(COLUMNS)} |"
    yield f"|{'---|' * len(COLUMNS)}"
    for finding in findings:
        cells = [_safe(text) for text in row(finding)]
        if finding.verdict in ("regressed", "changed", "vanished"):
            cells[3] = f"**{cells[3]}**"
        if finding.note:
            cells[2] += f"<br><sub>{_safe(finding.note)}</sub>"
        yield f"| {' | '.join(cells)} |"
    yield ""


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value == int(value) and abs(value) >= 1 else f"{value:.6g}"


def _difference(value: float, finding: Finding) -> str:
    """In the unit, or in per cent where the finding is relative; worse is positive."""
    return f"{100 * value:+.3g} %" if finding.relative else f"{value:+.3g}"


def _safe(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;").replace("*", "\\*")
