"""The Space as its visitors see it, in headless Chromium: `python space/app.py`, as it is.

The screenshots go to a temporary folder; SPACE_SCREENSHOTS=docs writes the two that docs/serving.md shows.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest
import torch
from conftest import random_image
from tiny_teachers import GRID, save_depth_anything
from tiny_vlms import idefics3

from ola_vlm.train import train
from ola_vlm.training.arguments import OlaVlmArguments

ROOT = Path(__file__).parents[1]
SCENE = ROOT / "docs" / "scene.png"
CLOSER = "which object is closer to the camera ? (A) red object (B) blue object"
EITHER = ("(A) red object", "(B) blue object")  # the answers to it
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import Error, sync_playwright

    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with sync_playwright() as playwright:
        try:
            chromium = playwright.chromium.launch(executable_path=found, args=quiet)
        except Error as error:
            how = "`make browser`, `apt-get install chromium` or `playwright install chromium`"
            pytest.fail(f"no Chromium for the Space's test: {how} installs one\n{error}")
        yield chromium
        chromium.close()


@contextmanager
def served(folder: Path, **settings: str) -> Iterator[str]:
    """The address of `python space/app.py`, which runs within the block with these settings in its environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder / "log.txt"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OLA_VLM_")}
    environment |= {"GRADIO_SERVER_PORT": str(port), "GRADIO_TEMP_DIR": str(folder / "uploads"), **settings}
    with log.open("w") as output:
        command = [sys.executable, "space/app.py"]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            for _ in range(240):
                assert process.poll() is None, log.read_text()
                try:
                    httpx.get(f"http://127.0.0.1:{port}/")
                    break
                except httpx.ConnectError:
                    time.sleep(1)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(30)
    assert "Traceback" not in log.read_text(), log.read_text()


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    with served(tmp_path_factory.mktemp("space"), OLA_VLM_CODE="https://github.com/me/ola_vlm") as address:
        yield address


@pytest.fixture(scope="module")
def attached(tmp_path_factory) -> Path:
    """A tiny VLM of another family, after two steps with the paper's predictors on its layers 2 and 4."""
    folder = tmp_path_factory.mktemp("attached")
    torch.manual_seed(0)
    for part in idefics3():
        part.save_pretrained(folder / "vlm")
    save_depth_anything(folder / "teacher")
    (folder / "images").mkdir()
    for i in range(4):
        random_image(i).save(folder / "images" / f"{i}.png")
    task = {"name": "depth", "layers": [2, 4], "target_length": GRID**2, "target_dim": 32}
    task |= {"num_task_tokens": 0, "predictor_heads": 2, "predictor_head_dim": 8}
    arguments = OlaVlmArguments(
        checkpoint=str(folder / "vlm"),
        tasks=[task],
        teachers={"depth": {"encoder": "depth_anything", "path": str(folder / "teacher")}},
        standardize_targets=True,
        target_cache=str(folder / "cache"),
        target_fill=True,
        data=str(folder / "images"),
        output_dir=str(folder / "attached"),
        image_options={"do_image_splitting": False},
        max_steps=2,
        per_device_train_batch_size=2,
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    train(arguments)
    return folder / "attached"


class Visitor:
    """A visitor of their own (a fresh context), who notes what the page asks of other hosts and what fails in it."""

    def __init__(self, browser, url: str, width: int = 1366, height: int = 768):
        self.page = browser.new_context(viewport={"width": width, "height": height}).new_page()
        self.page.set_default_timeout(60_000)
        self.elsewhere, self.failures = [], []
        self.page.on("request", lambda request: self._note(request.url, url))
        self.page.on("pageerror", lambda error: self.failures.append(str(error)))
        self.page.goto(url)
        self.page.locator("#question textarea").wait_for()

    def _note(self, asked: str, url: str) -> None:
        if not asked.startswith((url, "data:", "blob:")):
            self.elsewhere.append(asked)

    def send(self, text: str, *files) -> None:
        if files:
            with self.page.expect_file_chooser() as chooser:
                self.page.locator("#question .upload-button").click()
            chooser.value.set_files(list(files))
            self.page.locator("#question .thumbnail-item").nth(len(files) - 1).wait_for()
        self.page.locator("#question textarea").fill(text)
        self.page.locator("#question .submit-button").click()

    def show(self, name: str, **options) -> None:
        """A screenshot, without what is in motion."""
        self.page.wait_for_timeout(500)
        self.page.screenshot(path=name, **options)

    def is_on_screen(self, locator) -> bool:
        """Whole, without scrolling, once the page's parts have found their places: they come one after the other."""
        for _ in range(50):
            box = locator.bounding_box()
            if box is not None and box["y"] >= 0 and box["y"] + box["height"] <= self.page.viewport_size["height"]:
                return True
            self.page.wait_for_timeout(100)
        return False

    def answers(self, count: int, chat: int = 0) -> list[str]:
        """The texts of a chat's answers when there are `count` of them and the box is ready again."""
        shown = self.page.locator(".bubble-wrap").nth(chat)
        shown.wait_for()
        bots = shown.locator(".bot.message")
        self.page.wait_for_function(
            """([chat, count]) => {
                const bots = document.querySelectorAll('.bubble-wrap')[chat].querySelectorAll('.bot.message')
                const waits = one => !one.innerText.trim() || one.innerText.includes('Loading content')
                const told = [...bots].filter(one => !waits(one))
                return told.length >= count && document.querySelector('#question .submit-button')
            }""",
            arg=[chat, count],
        )
        texts = [text.strip() for text in bots.all_inner_texts()]
        assert len(texts) == count, texts
        return texts

    def regenerate(self) -> None:
        """Until the last answer is gone: before that a chat has as many answers as after it."""
        self.page.locator(".bot.message").last.evaluate("one => { one.dataset.former = 'yes' }")
        self.page.get_by_role("button", name="Regenerate").click()
        self.page.locator(".bot.message[data-former]").wait_for(state="detached")

    def toast(self, text: str | re.Pattern) -> None:
        self.page.locator(".toast-body", has_text=text).first.wait_for()

    def pictures(self, count: int) -> list[str]:
        shown = self.page.locator("#layers .grid-wrap img")
        shown.nth(count - 1).wait_for()
        assert shown.count() == count
        return [image.get_attribute("src") for image in shown.all()]

    def leave(self) -> None:
        assert not self.elsewhere, "the page asks other hosts"
        assert not self.failures
        self.page.context.close()


def test_a_visit(browser, url, tmp_path):
    folder = Path(os.environ.get("SPACE_SCREENSHOTS", tmp_path))
    visitor = Visitor(browser, url)
    assert visitor.page.locator(".example").count() == 4
    assert [link.inner_text() for link in visitor.page.locator("#about a").all()] == [
        "Code",
        "Paper",
        "Checkpoint",
        "Docs",
    ]
    visitor.page.locator(".example").first.click()
    assert visitor.answers(1) == ["(A) blue object\n\u2139 right: the truth is (A) blue object"]
    # depth and segmentation: teacher, decoded, nothing seen, five layers; gen: without decoded
    first = visitor.pictures(23)
    for picture in (0, 8, 22):  # of each gallery
        assert visitor.is_on_screen(visitor.page.locator("#layers .grid-wrap img").nth(picture))
    assert visitor.page.locator("#layers .swatch").count() >= 5 and visitor.page.locator("#layers .scale").is_visible()
    visitor.send("where is the red object ?")
    told = visitor.answers(2)
    assert re.fullmatch(r"x\d+ y\d+", told[1])
    assert visitor.pictures(23) == first  # no new image
    visitor.show(folder / "space_laptop.png")
    visitor.regenerate()
    assert visitor.answers(2) == told  # greedy
    visitor.page.locator("#compare").get_by_label("llava").check()
    taken_over = visitor.answers(2, chat=1)
    assert visitor.answers(2) == told and taken_over[0].startswith("\u2139 answered by words\n")
    assert taken_over[1] == f"\u2139 answered by words; Regenerate asks llava, too\n{told[1]}"
    visitor.page.get_by_role("button", name="Regenerate").click()
    second = visitor.page.locator(".bubble-wrap").nth(1)
    second.locator(".bot.message", has_text="answered by words").nth(1).wait_for(state="detached")
    mine = visitor.answers(2, chat=1)
    assert re.fullmatch(r"x\d+ y\d+", mine[1]) and visitor.answers(2) == told
    visitor.page.locator("#clear").click()
    visitor.page.locator(".example").nth(3).wait_for()
    visitor.page.locator("#layers .grid-wrap img").first.wait_for(state="detached")
    visitor.send(CLOSER, SCENE)
    assert {*visitor.answers(1, chat=0), *visitor.answers(1, chat=1)} <= {*EITHER}
    visitor.leave()


def test_nothing_yet(browser, url):
    visitor = Visitor(browser, url)
    visitor.page.get_by_role("button", name="Regenerate").click()
    visitor.toast("Not possible: there is no answer yet")
    assert not visitor.page.locator("#layers .grid-wrap").first.is_visible(), "an empty box"
    visitor.send(CLOSER)
    (told,) = visitor.answers(1)
    assert told.startswith("\u2139 no image yet") and told.endswith(EITHER)
    visitor.leave()


TARGETS = "button, a, textarea, input:not([type=checkbox]), .checkbox-container"
SMALL_TARGETS = f"""() => [...document.querySelectorAll('{TARGETS}')]
    .map(one => [one.getBoundingClientRect(), one.className, one.innerText])
    .filter(([box]) => box.width > 0 && (box.width < 39.5 || box.height < 39.5))
    .map(([box, name, text]) => [name, text, box.width, box.height])"""


def test_on_a_phone(browser, url, tmp_path):
    visitor = Visitor(browser, url, 390, 844)
    for locator in (visitor.page.locator(".example").first, visitor.page.locator("#question")):
        assert visitor.is_on_screen(locator)
    visitor.page.get_by_role("button", name="Regenerate").click()
    visitor.toast("Not possible")
    visitor.page.get_by_text("Sampling").click()
    visitor.page.wait_for_timeout(500)
    assert visitor.page.evaluate(SMALL_TARGETS) == []
    visitor.page.get_by_text("Sampling").click()
    visitor.page.locator(".toast-close").click()
    visitor.page.locator(".example").first.click()
    visitor.answers(1)
    visitor.pictures(23)
    visitor.page.evaluate("window.scrollTo(0, 0)")
    for part in (".user.message img", ".bot.message"):
        assert visitor.is_on_screen(visitor.page.locator(part).first)
    assert visitor.page.evaluate(SMALL_TARGETS) == []
    width = visitor.page.evaluate("document.documentElement.scrollWidth")
    assert width <= 390, "the page scrolls sideways"
    folder = Path(os.environ.get("SPACE_SCREENSHOTS", tmp_path))
    visitor.show(folder / "space_phone.png", full_page=True)
    visitor.leave()


def test_two_visitors_at_once(browser, url):
    one, other = Visitor(browser, url), Visitor(browser, url)
    for turn in (1, 2):
        one.send(CLOSER, SCENE)
        other.send("where is the red object ?", SCENE)
        assert all(text in EITHER for text in one.answers(turn))
        assert all(re.fullmatch(r"x\d+ y\d+", text) for text in other.answers(turn))
    for visitor in (one, other):
        visitor.leave()


def test_stop(browser, url):
    """Stopped, the model stops (only two answers are made at a time), and the next question is answered."""
    from playwright.sync_api import TimeoutError

    visitor = Visitor(browser, url)

    def sample(temperature: str, tokens: str) -> None:
        for label, value in (("Temperature", temperature), ("Max new tokens", tokens)):
            number = visitor.page.get_by_label(f"number input for {label}")
            number.fill(value)
            number.press("Tab")

    visitor.page.get_by_text("Sampling").click()
    sample("2", "1024")  # rambles, sometimes for long
    for _ in range(6):
        visitor.send("describe the image .", SCENE)
        with suppress(TimeoutError):  # an answer may end by itself
            visitor.page.locator("#question .stop-button").click(timeout=5_000)
        visitor.page.locator("#question .submit-button").wait_for()
    visitor.page.locator("#clear").click()
    sample("0", "16")
    visitor.send(CLOSER, SCENE)
    visitor.page.set_default_timeout(20_000)
    assert visitor.answers(1)[0] in EITHER
    visitor.leave()


def test_garbage(browser, url, tmp_path):
    visitor = Visitor(browser, url)
    (tmp_path / "text.png").write_text("no image")
    visitor.send("what is there", tmp_path / "text.png")
    visitor.toast("text.png can't be read as an image")
    visitor.page.reload()
    visitor.page.locator("#question textarea").wait_for()
    visitor.send("many " * 2000)
    visitor.toast("more than 4,000")
    visitor.send("what <image> is <b>there</b> ?")
    visitor.toast("<image> is read as plain text")
    visitor.answers(1)
    assert visitor.page.locator(".user.message").inner_text().strip() == "what <image> is <b>there</b> ?"
    (tmp_path / "big.png").write_bytes(bytes(11 * 2**20))
    visitor.page.set_input_files("#question input[type=file]", tmp_path / "big.png")
    visitor.toast(re.compile("size", re.IGNORECASE))
    visitor.leave()


def test_a_model_of_another_family(browser, attached, tmp_path):
    """Given as OLA_VLM_CHECKPOINT: it answers, and its own predictors' pictures are shown."""
    with served(tmp_path, OLA_VLM_CHECKPOINT=str(attached)) as address:
        visitor = Visitor(browser, address)
        assert "you talk to attached" in visitor.page.locator("#about").inner_text()
        visitor.send("what is this ?", SCENE)
        assert visitor.answers(1)[0]
        # the teacher, decoded, nothing seen, and the two layers that have predictors
        visitor.pictures(5)
        visitor.show(tmp_path / "attached.png")
        visitor.leave()
