"""html, PDF and DOCX -> their text."""

from __future__ import annotations

import io
import logging
import re
import zipfile
from html.parser import HTMLParser

from cllm_spheres.text.files import NotText

_HTML = re.compile(r"\ufeff?\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*<(!doctype\s+html|html|head|body)\b", re.I | re.S)
_HIDDEN = frozenset({"script", "style", "template", "svg", "noscript", "iframe", "object"})
_BLOCKS = frozenset(
    """
    address article aside blockquote body br caption center dd details dialog div dl dt fieldset
    figcaption figure footer form h1 h2 h3 h4 h5 h6 head header hr html legend li main nav ol option p
    pre section summary table tbody td tfoot th thead title tr ul
    """.split()  # noqa: SIM905
)

_MOST_AT_END = 4096  # characters of a tag without an end: Python's parser looks at each "<" in it, to the file's end
_MOST_OPEN = 64 << 20  # characters of a tag that has not ended yet: they are all in memory


def is_html(head: str) -> bool:
    """Whether a text begins as an html page does."""
    return _HTML.match(head[:10_000]) is not None


class HtmlText(HTMLParser):
    """Streams html in and visible text out: one line a block, white space collapsed except in <pre>."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._out: list[str] = []
        self._hidden = 0
        self._pre = 0
        self._line_open = False
        self._blank = False

    def feed(self, data: str) -> str:  # type: ignore[override]
        """The text that became complete with this piece of html. NotText where it cannot be parsed."""
        try:
            super().feed(data)
        except ValueError:  # the number of a character has more digits than Python reads
            raise NotText("damaged html") from None
        if len(self.rawdata) > _MOST_OPEN:
            raise NotText("damaged html")
        return self._take()

    def parse_marked_section(self, i: int, report: bool = True) -> int:
        """<![...]> of a kind that Python does not know is a comment, as in every browser."""
        try:
            return super().parse_marked_section(i, report)
        except AssertionError:  # of its parser, for what stands in the text
            return self.parse_bogus_comment(i, report)

    def finish(self) -> str:
        """The rest of the text. A tag or a comment that never ended is left away, as in every browser."""
        if self.rawdata.startswith("<") and len(self.rawdata) > _MOST_AT_END:
            self.rawdata = ""
        try:
            super().close()
        except ValueError:
            raise NotText("damaged html") from None
        self._break()
        return self._take()

    def _take(self) -> str:
        text = "".join(self._out)
        self._out.clear()
        return text

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag in _HIDDEN:
            self._hidden += 1
        elif tag in _BLOCKS:
            self._break()
            self._pre += tag == "pre"

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        if tag in _BLOCKS:
            self._break()

    def handle_endtag(self, tag: str) -> None:
        if tag in _HIDDEN:
            self._hidden = max(0, self._hidden - 1)
        elif tag in _BLOCKS:
            self._break()
            self._pre = max(0, self._pre - (tag == "pre"))

    def handle_data(self, data: str) -> None:
        if self._hidden:
            return
        if self._pre:
            self._out.append(data)
            self._line_open = not data.endswith("\n")
            self._blank = False
            return
        words = " ".join(data.split())
        if words:
            if self._line_open and (self._blank or data[0].isspace()):
                self._out.append(" ")
            self._out.append(words)
            self._line_open = True
        self._blank = data[-1:].isspace() if words else self._blank or bool(data)

    def _break(self) -> None:
        if self._line_open:
            self._out.append("\n")
        self._line_open = self._blank = False


def is_docx(source: bytes | str) -> bool:
    """Whether a zip file, a path or its first bytes, is a Word document."""
    if isinstance(source, bytes):
        return b"word/document.xml" in source
    try:
        with zipfile.ZipFile(source) as archive:
            return "word/document.xml" in archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return False


def pdf_text(data: bytes) -> str:
    """The text of a PDF, page after page. NotText where pypdf is missing or cannot read it."""
    try:
        import pypdf
    except ImportError:
        raise NotText("pdf") from None
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)
    try:
        pages = [page.extract_text() for page in pypdf.PdfReader(io.BytesIO(data)).pages]
    except Exception:  # damaged PDFs raise anything
        raise NotText("damaged pdf") from None
    return "\n".join(pages)


def docx_text(data: bytes) -> str:
    """The paragraphs and table cells of a DOCX, in order. NotText where python-docx is missing or fails."""
    try:
        import docx
    except ImportError:
        raise NotText("docx") from None
    try:
        lines: list[str] = []
        for block in docx.Document(io.BytesIO(data)).iter_inner_content():
            if hasattr(block, "rows"):
                lines += ["\t".join(cell.text for cell in row.cells) for row in block.rows]
            else:
                lines.append(block.text)
    except Exception:  # damaged files raise anything
        raise NotText("damaged docx") from None
    return "\n".join(lines) + "\n"
