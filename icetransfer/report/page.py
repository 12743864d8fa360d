"""A report as a list of parts, written as one self-contained HTML page or as Markdown.

The parts are few: headings, sentences, lists, tables, figures, commands.  Text may hold **bold**,
`code` and [links](target) in Markdown's way; nothing else in it is special.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from icetransfer.report import figures
from icetransfer.stage.markdown import markdown_table

# Fonts, colours and widths; a table wider than a phone scrolls by itself, the page does not
CSS = """
:root {{ color-scheme: light dark; {light} --back: #ffffff; --panel: #f5f6f8; --link: #0057a8; }}
@media (prefers-color-scheme: dark) {{
  :root {{ {dark} --back: #16181b; --panel: #212429; --link: #7ab8f5; }}
}}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; max-width: 70rem; padding: 1rem; background: var(--back);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: break-word; }}
h1 {{ font-size: 1.6rem; line-height: 1.2; margin: 0.5rem 0; }}
h2 {{ font-size: 1.25rem; margin: 2rem 0 0.5rem; border-bottom: 1px solid var(--grid); }}
a {{ color: var(--link); }}
.answer {{ background: var(--panel); border-left: 5px solid var(--series-0);
  padding: 0.4rem 1rem; margin: 0.8rem 0; }}
.answer p {{ font-size: 1.15rem; margin: 0.4rem 0; }}
.answer ul {{ padding-left: 1.2rem; margin: 0.4rem 0; }}
.figures {{ display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%,
  26rem), 1fr)); }}
figure {{ margin: 0; background: var(--panel); padding: 0.5rem; max-width: 36rem; }}
figure svg {{ width: 100%; height: auto; display: block; }}
figcaption {{ font-size: 0.85rem; }}
.scroll {{ overflow-x: auto; margin: 0.6rem 0; }}
table {{ border-collapse: collapse; font-size: 0.88rem; font-variant-numeric: tabular-nums; }}
th, td {{ padding: 0.2rem 0.6rem; text-align: left; border-bottom: 1px solid var(--grid);
  vertical-align: top; }}
td.short {{ white-space: nowrap; }}
td.long {{ min-width: 18rem; max-width: 30rem; }}
th {{ background: var(--panel); }}
.clips {{ display: grid; gap: 0.8rem; grid-template-columns: repeat(auto-fill, minmax(min(100%,
  22rem), 1fr)); }}
.clip {{ background: var(--panel); padding: 0.6rem; }}
.clip p {{ margin: 0.2rem 0; overflow-wrap: anywhere; }}
.clip small {{ font-size: 0.85rem; }}
audio {{ width: 100%; }}
pre {{ background: var(--panel); padding: 0.6rem; overflow-x: auto; }}
"""
SHORT = 34  # characters of a table's cell that are not broken into lines


@dataclass(frozen=True)
class Heading:
    """A heading of a section."""

    text: str


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Answer:
    """What the reader came for, set off from the rest: a sentence, and what it rests on."""

    text: str
    lines: Sequence[str]


@dataclass(frozen=True)
class Bullets:
    """A list."""

    lines: Sequence[str]


@dataclass(frozen=True)
class Code:
    """Commands."""

    text: str


@dataclass(frozen=True)
class TablePart:
    """A table; cells may hold bold text."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    first: int | None = None  # rows that are enough at the prompt; None for all


@dataclass(frozen=True)
class Drawing:
    """A figure."""

    name: str  # of its file
    svg: str
    caption: str


@dataclass(frozen=True)
class Gallery:
    """Figures side by side."""

    drawings: Sequence[Drawing]


@dataclass(frozen=True)
class Clip:
    """A recording to listen to.

    Attributes:
        title: What it is.
        lines: What is said of it; nothing in them or in the title is special.
        source: The audio as a data URI; None where it cannot be read.
    """

    title: str
    lines: Sequence[str]
    source: str | None


@dataclass(frozen=True)
class Clips:
    """Recordings side by side, each with a player; Markdown has none."""

    clips: Sequence[Clip]


Part = Heading | Text | Answer | Bullets | Code | TablePart | Gallery | Clips


@dataclass
class Document:
    """A title and the parts under it."""

    title: str
    parts: list[Part] = field(default_factory=list)

    @property
    def drawings(self) -> list[Drawing]:
        """All figures."""
        return [d for part in self.parts if isinstance(part, Gallery) for d in part.drawings]


def to_html(document: Document) -> str:
    """The page, which needs no other file."""
    css = CSS.format(
        light=figures.colour_rules(dark=False), dark=figures.colour_rules(dark=True)
    ).strip()
    numbers = {drawing.name: n for n, drawing in enumerate(document.drawings)}
    body = "\n".join(_html(part, numbers) for part in document.parts)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(document.title)}</title>\n<style>\n{css}\n</style>\n</head>\n"
        f"<body>\n<h1>{_inline(document.title)}</h1>\n{body}\n</body>\n</html>\n"
    )


def _html(part: Part, numbers: dict[str, int]) -> str:
    if isinstance(part, Heading):
        return f"<h2>{_inline(part.text)}</h2>"
    if isinstance(part, Text):
        return f"<p>{_inline(part.text)}</p>"
    if isinstance(part, Answer):
        return f'<div class="answer"><p>{_inline(part.text)}</p>{_list(part.lines)}</div>'
    if isinstance(part, Bullets):
        return _list(part.lines)
    if isinstance(part, Code):
        return f"<pre>{html.escape(part.text)}</pre>"
    if isinstance(part, TablePart):
        head = "".join(f"<th>{_inline(cell)}</th>" for cell in part.header)
        rows = "\n".join(
            "<tr>" + "".join(_cell(cell) for cell in row) + "</tr>" for row in part.rows
        )
        table = f"<table>\n<tr>{head}</tr>\n{rows}\n</table>"
        return f'<div class="scroll">{table}</div>'
    if isinstance(part, Clips):
        return f'<div class="clips">{"".join(map(_clip, part.clips))}</div>'
    drawn = "\n".join(
        f"<figure>{_labelled(figures.inline(d.svg, numbers[d.name]), d.caption)}"
        f"<figcaption>{_inline(d.caption)}</figcaption></figure>"
        for d in part.drawings
    )
    return f'<div class="figures">{drawn}</div>'


def _clip(clip: Clip) -> str:
    lines = "".join(f"<p><small>{html.escape(line)}</small></p>" for line in clip.lines)
    player = f'<audio controls preload="none" src="{clip.source}"></audio>' if clip.source else ""
    return (
        f'<div class="clip"><p><strong>{html.escape(clip.title)}</strong></p>{player}{lines}</div>'
    )


def _list(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{_inline(line)}</li>" for line in lines) + "</ul>"


def _cell(text: str) -> str:
    kind = "short" if len(text) <= SHORT else "long"
    return f'<td class="{kind}">{_inline(text)}</td>'


def _labelled(svg: str, caption: str) -> str:
    """For readers who hear the page."""
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(caption)}" ', 1)


def _inline(text: str) -> str:
    text = html.escape(text, quote=False)
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
    text = re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", text)
    return re.sub(r"\[([^\]]+)\]\(([^)\s]+)\)", r'<a href="\2">\1</a>', text)


def plain(text: str) -> str:
    """Text without its marks, and of a link its words."""
    text = re.sub(r"`([^`]+)`|\*\*([^*]+)\*\*", lambda match: match[1] or match[2], text)
    return re.sub(r"\[([^\]]+)\]\([^)\s]+\)", r"\1", text)


def to_markdown(document: Document, folder: str) -> str:
    """The same as Markdown.

    Args:
        document: what to write.
        folder: where `write_figures` puts the figures, relative to the Markdown file.
    """
    parts = [f"# {document.title}"]
    for part in document.parts:
        if isinstance(part, Heading):
            parts.append(f"## {part.text}")
        elif isinstance(part, Text):
            parts.append(part.text)
        elif isinstance(part, Answer):
            parts += [part.text, "\n".join(f"* {line}" for line in part.lines)]
        elif isinstance(part, Bullets):
            parts.append("\n".join(f"* {line}" for line in part.lines))
        elif isinstance(part, Code):
            parts.append(f"```\n{part.text}\n```")
        elif isinstance(part, TablePart):
            rows = [[cell.replace("|", "\\|") for cell in row] for row in part.rows]
            parts.append(markdown_table(list(part.header), rows).rstrip())
        elif isinstance(part, Clips):
            parts.append(
                "\n".join(f"* {clip.title}: {'; '.join(clip.lines)}" for clip in part.clips)
            )
        else:
            parts += [f"![{d.caption}]({folder}/{d.name}.svg)" for d in part.drawings]
    return "\n\n".join(parts) + "\n"
