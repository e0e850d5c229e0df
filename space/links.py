"""Where the page's links lead."""

import json
from importlib import metadata
from pathlib import Path

PAPER = "https://arxiv.org/abs/2412.09585"


def code_address() -> str | None:
    """Where the package was installed from, at its commit; None if that was no repository on the web."""
    try:
        # pip writes this file for a package that it installed from an address (PEP 610).
        origin = json.loads(metadata.distribution("ola-vlm").read_text("direct_url.json") or "{}")
    except metadata.PackageNotFoundError:
        # Not installed: run from its folder.
        origin = {}
    if "vcs_info" not in origin or not origin["url"].startswith("https://"):
        return None
    return f"{origin['url'].removesuffix('.git')}/tree/{origin['vcs_info']['commit_id']}"


def make_links(checkpoint: str | None, code: str | None) -> dict[str, str]:
    """Title -> address; `checkpoint`: a folder or a name on the Hub, None for the miniature; `code`: the repository's
    address. What has no known address isn't linked."""
    links = {"Paper": PAPER}
    # A name on the Hub. A folder of this machine has no address.
    if checkpoint is not None and not Path(checkpoint).exists():
        links["Checkpoint"] = f"https://huggingface.co/{checkpoint}"
    if code is None:
        return links
    # An address at a commit says its tree already.
    folder = code if "/tree/" in code else f"{code}/tree/main"
    if checkpoint is None:
        links["Checkpoint"] = f"{folder}/miniature/weights/words"
    return {"Code": code, **links, "Docs": f"{folder}/docs"}
