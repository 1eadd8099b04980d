"""An HTML page as tests read it."""

from html.parser import HTMLParser

#: A name that would run a script or load something, where it is not escaped.
HOSTILE = (
    """<script>alert('x')</script><img src="http://evil.test/x" onerror="alert(1)">{{ 7 * 7 }}&amp;"'`|"""
)
VOID = {"meta", "br", "img", "link", "input"}


class Page(HTMLParser):
    """The tags of a page with their attributes, its text, and that every tag is closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.styles: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        (self.styles if self.open[-1:] == ["style"] else self.words).append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())
