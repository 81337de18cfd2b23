"""Conversation, layers and the card of a code as HTML. Whatever a model or a person wrote is escaped here.

What can be clicked carries `data-finding`, the region's number; `SCRIPT` reports it to the page's events.
"""

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any

from medsight.scans import Scan
from processing_medsight.region_codes_medsight import REGION_CODE

from .drawing import color_of
from .session import Finding, Turn


# The page's HTML components run this once. Buttons come as `click`, checkboxes as `select`.
SCRIPT = """
element.addEventListener("click", event => {
  const button = event.target.closest("button[data-finding]");
  if (!button) return;
  trigger("click", {finding: Number(button.dataset.finding)});
  // On a phone the picture is above the conversation.
  document.getElementById("ms-picture")?.scrollIntoView({block: "nearest"});
});
element.addEventListener("change", event => {
  const box = event.target.closest("input[data-finding]");
  if (box) trigger("select", {finding: Number(box.dataset.finding), shown: box.checked});
});
"""
_PUNCTUATION = re.compile(r"[.,;:!?]+")
# A component's HTML is read as a template in the browser: these begin its expressions.
_TEMPLATE = str.maketrans({"{": "&#123;", "}": "&#125;", "$": "&#36;", "`": "&#96;"})


def escape(text: str) -> str:
    """`text` as HTML that shows exactly it."""
    return html.escape(text).translate(_TEMPLATE)


def conversation(turns: Sequence[Turn], num_slices: int) -> str:
    """All turns; in answers, words have the colour of their mask and are followed by their codes.

    Args:
        num_slices: of the scan; turns on a slice of a volume say on which.
    """
    if not turns:
        return (
            '<div class="ms-chat" role="log" aria-label="Conversation">'
            '<p class="ms-empty">Open an image or an example, then ask about it. Where an answer names a structure, '
            "its words have the colour of a mask, and a code follows: click it to see how sure the model is of each "
            "pixel, and what the code usually means.</p></div>"
        )
    parts, where = [], None
    for turn in turns:
        if num_slices > 1 and (turn.slice_index, turn.window) != where:
            where = turn.slice_index, turn.window
            window = "" if turn.window is None else f", window {escape(window_text(turn.window))}"
            parts.append(f'<p class="ms-slice">Slice {turn.slice_index + 1} of {num_slices}{window}</p>')
        parts.append(f'<p class="ms-question"><span class="ms-who">You: </span>{escape(turn.question)}</p>')
        parts.append(f'<p class="ms-answer"><span class="ms-who">MedSIGHT: </span>{_answer(turn)}</p>')
    return f'<div class="ms-chat" role="log" aria-label="Conversation">{"".join(parts)}</div>'


def window_text(window: str | tuple[float, float] | None) -> str:
    """A window as the page's field has it."""
    if window is None or isinstance(window, str):
        return window or "default"
    return f"{window[0]:g}/{window[1]:g}"


def _answer(turn: Turn) -> str:
    if turn.answer is None:
        streamed = REGION_CODE.sub(lambda code: f'<span class="ms-code">{code[0]}</span>', escape(turn.text))
        return f'{streamed}<span class="ms-cursor" aria-hidden="true"></span>'
    text, start, parts = turn.answer.text, 0, []
    by_span: dict[tuple[int, int] | None, list[Finding]] = {}
    for finding in turn.findings:
        by_span.setdefault(finding.region.span, []).append(finding)
    for span in sorted(span for span in by_span if span is not None):
        parts.append(escape(text[start : span[0]]))
        color = color_of(by_span[span][0].number)
        parts.append(f'<mark style="--ms-color: {color}">{escape(text[slice(*span)])}</mark>')
        buttons = [code_button(finding) for finding in by_span[span]]
        stop = _PUNCTUATION.match(text, span[1])
        start = stop.end() if stop else span[1]
        # A full stop does not go onto a line of its own.
        buttons[-1] = f'<span class="ms-tie">{buttons[-1]}{escape(text[span[1] : start])}</span>'
        parts.append(" " + " ".join(buttons))
    parts.append(escape(text[start:]))
    parts += [f" {code_button(finding)}" for finding in by_span.get(None, [])]
    if not text and not turn.findings:
        parts.append('<span class="ms-note">no answer</span>')
    if turn.stopped or (turn.answer is not None and turn.answer.is_complete is False):
        parts.append(f' <span class="ms-note">({"stopped" if turn.stopped else "cut: see Longest answer"})</span>')
    return "".join(parts)


def code_button(finding: Finding, numbered: bool = True) -> str:
    """A code that shows its heat map when it is clicked."""
    code = escape(finding.region.code)
    number = f'<span class="ms-number">{finding.number + 1}</span>' if numbered else "Heat map "
    return (
        f'<button type="button" class="ms-code" data-finding="{finding.number}" '
        f'style="--ms-color: {color_of(finding.number)}" title="Heat map and meaning of {code}">'
        f"{number}{code}</button>"
    )


def layers(findings: Sequence[Finding], areas: Sequence[str], hidden: set[int]) -> str:
    """A checkbox a region: on, its mask is drawn.

    Args:
        areas: what to say of each region's size.
        hidden: numbers of the regions that are off.
    """
    if not findings:
        return ""
    rows = "".join(
        f'<li style="--ms-color: {color_of(finding.number)}"><label>'
        f'<input type="checkbox" data-finding="{finding.number}"{"" if finding.number in hidden else " checked"}>'
        f'<span class="ms-number">{finding.number + 1}</span> {escape(finding.label)}</label>'
        f'<span class="ms-size">{escape(area)}</span>{code_button(finding, numbered=False)}</li>'
        for finding, area in zip(findings, areas, strict=True)
    )
    return f'<fieldset class="ms-layers"><legend>Masks</legend><ul>{rows}</ul></fieldset>'


def code_card(finding: Finding, region_codes: Mapping[str, Any] | None) -> str:
    """What a code is and what it usually means.

    Args:
        region_codes: the content of the checkpoint's region_codes.json, or `None` where it has none.
    """
    region = finding.region
    facts = [f"group <b>{escape(region.group_name or str(region.group))}</b>", f"code {region.code_index}"]
    if region.score is not None:
        facts.append(f"score {region.score:.2f}")
    known = None if region_codes is None else region_codes["codes"].get(region.code)
    if region_codes is None:
        meaning = "This checkpoint does not tell what its codes usually mean (<code>medsight codes</code> finds out)."
    elif known is not None:
        ranked = sorted(known["structures"].items(), key=lambda entry: -entry[1])[:3]
        usual = ", ".join(f"<b>{escape(name)}</b> {100 * share:.0f}%" for name, share in ranked)
        meaning = f"It usually means: {usual} (of {known['n']:,} reference masks)."
    else:
        meaning = "What it usually means is not known: no reference mask was given this code."
    return (
        f'<section class="ms-card" style="--ms-color: {color_of(finding.number)}" role="status">'
        f"<h3>Heat map of {escape(region.code)}</h3><p>{', '.join(facts)}. {meaning}</p>"
        '<p class="ms-scale"><span>0</span><span class="ms-ramp" aria-hidden="true"></span>'
        "<span>1 probability</span></p></section>"
    )


def scan_facts(scan: Scan) -> str:
    """One line on what is open; nothing in it is about a person."""
    name = {"image": "Picture", "array": "Array", "dicom": "DICOM", "nifti": "NIfTI"}[scan.kind]
    facts = [name if scan.modality is None else f"{name}, {scan.modality}"]
    if scan.num_slices > 1:
        facts.append(f"{scan.num_slices} slices")
    facts.append(f"{scan.width} × {scan.height} pixels")
    if scan.pixel_spacing is not None:
        between = [scan.slice_spacing] if scan.num_slices > 1 and scan.slice_spacing else []
        facts.append(" × ".join(f"{side:.3g}" for side in (*scan.pixel_spacing, *between)) + " mm")
    return f'<p class="ms-facts">{escape(" · ".join(facts))}</p>'
