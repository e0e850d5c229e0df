"""Texts of other people's files, made harmless for where they are shown: the names of rows, classes, models, teachers,
a model's answers. A text is trusted nowhere; each place has its own letters that mean more than themselves.

HTML has `html.escape`.
"""

import logging
import re

# Control characters but for tab and new line (ESC moves the cursor and renames the window), and those that turn the
# direction of what follows.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def _code(found: re.Match) -> str:
    number = ord(found[0])
    return f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}"


def terminal(text: object) -> str:
    r"""For a terminal or a log: control characters become their codes, "\x1b"."""
    return CONTROL.sub(_code, str(text))


def one_line(text: object) -> str:
    """The same on a line of its own."""
    return terminal(" ".join(str(text).split()))


def markdown(text: object) -> str:
    """For a card: one line, which neither ends a table's cell nor opens a tag, a link, a heading or a code block."""
    plain = one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    plain = re.sub(r"([\\`*\[\]|~$])", r"\\\1", plain)
    return re.sub(r"(?<!\w)_|_(?!\w)|^[#>+-]", r"\\\g<0>", plain)  # within a word "_" is a letter


def code(text: object) -> str:
    """For a card, between backticks: a name as it is, without what would end it."""
    plain = one_line(text).replace("`", "'").replace("|", "¦")
    return f"`{plain}`"


def mathtext(text: object) -> str:
    """For a figure: "$" opens no formula, and a leading "_" doesn't hide a legend's entry."""
    plain = terminal(text).replace("$", r"\$")
    return f" {plain}" if plain.startswith("_") else plain


class TerminalFormatter(logging.Formatter):
    """Log lines as `terminal` shows them."""

    def format(self, record: logging.LogRecord) -> str:
        return terminal(super().format(record))


def log_to_terminal() -> None:
    """The root logger's handler, unless it has one already."""
    handler = logging.StreamHandler()
    handler.setFormatter(TerminalFormatter("%(message)s"))
    logging.basicConfig(handlers=[handler])
