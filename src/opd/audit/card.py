"""A verdict as one HTML page that stands alone: for a pull request, or a reviewer."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable

from opd.audit.targets import NO_CLAIM, words
from opd.audit.verdict import Verdict

__all__ = ["card"]

_COLOURS = ("#1d4ed8", "#b45309", "#047857", "#a21caf")
"""Of the kinds of rows, ordinary ones first; told apart by those who see few colours too."""

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
       color: #1a1d21; background: #fff }
h1 { font-size: 1.3rem; margin: 0 0 .3rem } h2 { font-size: 1rem; margin: 2rem 0 .5rem }
.verdict { padding: .8rem 1rem; border-left: .4rem solid #6b7280; background: #f4f5f7 }
.holds { border-color: #15803d } .fails { border-color: #b91c1c }
table { border-collapse: collapse; width: 100% }
th:not(.number) { text-align: left }
th { font-weight: 600; color: #555c66 }
th, td { padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #e3e5e9; vertical-align: top }
.number { text-align: right; font-variant-numeric: tabular-nums }
.fault { color: #b91c1c; font-weight: 600 } .caution { color: #92400e; font-weight: 600 }
.ok { color: #15803d } .none { color: #6b7280 }
figure { margin: 0 } figcaption { color: #555c66; font-size: .9rem }
.legend { margin: .2rem 0; padding-left: 1.2rem; font-size: .9rem }
svg text { font: 12px system-ui, sans-serif; fill: #555c66 }
"""


def card(verdict: Verdict) -> str:
    """The page: verdict, picture, findings, every check with its figures."""
    tone = {None: "", True: "holds", False: "fails"}[verdict.holds]
    claimed = "" if verdict.claim == NO_CLAIM else f"<p>Claimed: {_text(words(verdict.claim))}.</p>"
    body = [
        f"<h1>{_text(verdict.name)}</h1>",
        f'<p class="verdict {tone}">{_text(verdict.sentence)}</p>',
        claimed,
        _picture(verdict),
        "<h2>Findings</h2>",
        _table(
            ("", "what", "seen"),
            (
                (_level(finding.is_fault), _text(finding.name), _text(finding.message))
                for finding in verdict.findings
            ),
        )
        if verdict.findings
        else "<p>None.</p>",
        "<h2>Cosine with the gradients of</h2>",
        _table(
            ("", "cosine"),
            ((_text(words(text)), _number(value)) for text, value in verdict.cosines.items()),
            numbers=("cosine",),
        ),
        "<h2>Checks</h2>",
        _table(
            ("check", "", "seen", "figures"),
            (
                (
                    _text(check.name),
                    _status(check.status),
                    _text(check.message),
                    "<br>".join(
                        f"{_text(name)}: {_number(value)}" for name, value in check.figures.items()
                    ),
                )
                for check in verdict.checks
            ),
            numbers=("figures",),
        ),
        f'<p class="none">Audited in {verdict.seconds:.1f} CPU-seconds with opd.</p>',
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Audit of {_text(verdict.name)}</title><style>{_STYLE}</style></head><body>"
        + "\n".join(body)
        + "</body></html>\n"
    )


def _picture(verdict: Verdict) -> str:
    """Each entry of the gradient against the same entry of the claimed one, by kind of rows."""
    size, pad = 320.0, 36.0
    inner, middle = size - 2 * pad, size / 2

    def place(value: float) -> float:
        return pad + (min(max(value, -1.2), 1.2) / 1.2 + 1) / 2 * inner

    dots = "".join(
        f'<circle cx="{place(x):.1f}" cy="{size - place(y):.1f}" r="3.5" fill="{colour}" '
        f'fill-opacity="0.6"><title>{_text(label)}</title></circle>'
        for (label, points), colour in zip(verdict.points.items(), _COLOURS, strict=False)
        for x, y in points
        if math.isfinite(x) and math.isfinite(y)
    )
    legend = "".join(
        f'<li style="color: {colour}">{_text(label)}</li>'
        for label, colour in zip(verdict.points, _COLOURS, strict=False)
    )
    of = "the nearest with a name" if verdict.claim == NO_CLAIM else words(verdict.claim)
    return (
        f'<figure><svg viewBox="0 0 {size:.0f} {size:.0f}" width="{size:.0f}" role="img" '
        f'aria-label="entries of the gradient against those of {_text(of)}">'
        f'<rect x="{pad}" y="{pad}" width="{inner}" height="{inner}" fill="none" '
        'stroke="#c7cbd1"/>'
        f'<line x1="{pad}" y1="{size - pad}" x2="{size - pad}" y2="{pad}" stroke="#9aa0a8" '
        f'stroke-dasharray="4 4"/>{dots}'
        f'<text x="{middle}" y="{size - 12}" text-anchor="middle">gradient of {_text(of)}</text>'
        f'<text x="16" y="{middle}" text-anchor="middle" '
        f'transform="rotate(-90 16 {middle})">the loss\'s, scaled</text></svg>'
        f'<ul class="legend">{legend}</ul>'
        "<figcaption>One dot per state and token. A loss that descends what is on the horizontal "
        "axis has all its dots on the dashed line; those further out are drawn at the edge."
        "</figcaption></figure>"
    )


def _table(
    header: Iterable[str], rows: Iterable[Iterable[str]], *, numbers: tuple[str, ...] = ()
) -> str:
    names = tuple(header)
    css = [' class="number"' if name in numbers else "" for name in names]
    head = "".join(f"<th{kind}>{name}</th>" for name, kind in zip(names, css, strict=True))
    body = "".join(
        "<tr>"
        + "".join(f"<td{kind}>{cell}</td>" for cell, kind in zip(row, css, strict=True))
        + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _level(is_fault: bool) -> str:
    name = "fault" if is_fault else "caution"
    return f'<span class="{name}">{name}</span>'


def _status(status: str) -> str:
    css = {"ok": "ok", "noted": "caution", "found": "fault", "not applicable": "none"}[status]
    return f'<span class="{css}">{status}</span>'


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4g}"


def _text(text: str) -> str:
    return html.escape(text)
