"""Texts of other people's files, made harmless for where they are shown: the names of rows, classes, models, teachers,
a model's answers. A text is trusted nowhere; each place has its own letters that mean more than themselves.

HTML has `html.escape`.
"""

import logging
import re

# Control characters but for tab and new line (ESC moves the cursor and renames the window), and those that turn the
# direction of what follows.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")

# Where an address can be parted: "https:|//example.org", "www|.example.org", "someone@|example.org".
ADDRESS = re.compile(r"(?<=:)(?=//)|(?<=www)(?=\.)|(?<=[\w.+-]@)(?=[\w-])", re.IGNORECASE)


def _code(found: re.Match) -> str:
    number = ord(found[0])
    # Python's own notations, so that the code can be pasted into a string: "\x1b", "\u202e".
    if number < 256:
        return f"\\x{number:02x}"
    return f"\\u{number:04x}"


def terminal(text: object) -> str:
    r"""For a terminal or a log: control characters become their codes, "\x1b"."""
    return CONTROL.sub(_code, str(text))


def one_line(text: object) -> str:
    """The same on a line of its own."""
    return terminal(" ".join(str(text).split()))


def markdown(text: object) -> str:
    """For a card: one line, which neither ends a table's cell nor opens a tag, a link, a heading or a code block."""
    # Ampersands first: the other replacements write some of their own.
    plain = one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    # A bare address becomes a link, even with a backslash or an entity in it, which some renderers undo first. A
    # comment, which isn't shown, parts it into two texts that are no addresses.
    plain = ADDRESS.sub("<!-- -->", plain)
    # What has a meaning anywhere in a line: "|" ends a cell, "~" strikes out, "$" opens a formula.
    plain = re.sub(r"([\\`*\[\]|~$])", r"\\\1", plain)
    # "_" emphasizes only at the edge of a word; "#", "+", "-" begin a heading or a list only at the line's start.
    return re.sub(r"(?<!\w)_|_(?!\w)|^[#>+-]", r"\\\g<0>", plain)


def code(text: object) -> str:
    """For a card, between backticks: a name as it is, without what would end it."""
    # Look-alikes: within backticks a backslash would be shown as itself.
    plain = one_line(text).replace("`", "'").replace("|", "¦")
    return f"`{plain}`"


def mathtext(text: object) -> str:
    """For a figure: "$" opens no formula, and a leading "_" doesn't hide a legend's entry."""
    # Between two "$" matplotlib parses a formula, and raises an error in the middle of a figure if it is none.
    plain = terminal(text).replace("$", r"\$")
    if plain.startswith("_"):
        return f" {plain}"
    return plain


class TerminalFormatter(logging.Formatter):
    """Log lines as `terminal` shows them."""

    def format(self, record: logging.LogRecord) -> str:
        return terminal(super().format(record))


def log_to_terminal() -> None:
    """The root logger's handler, unless it has one already."""
    # It says at every start, on every machine, that a faster kernel for 4 bits on a CPU isn't installed.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # Records name rows, files and models of others: all of them pass the formatter.
    handler = logging.StreamHandler()
    handler.setFormatter(TerminalFormatter("%(message)s"))
    logging.basicConfig(handlers=[handler])
