"""The Space under load: `python benchmarks/space.py` starts space/app.py and visits it over its API.

10 visitors with a picture each queue 20 questions at the same time, several rounds. Of every answer it is checked that
it is the one to this picture and question, as the model gives it alone. Then what skips the queue, and what one large
PNG costs that is named 16 times. Memory: resident, of the Space's process.
"""

import argparse
import io
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
from PIL import Image

from ola_vlm.inference.chat import Chat
from ola_vlm.inference.questions import option_words
from ola_vlm.space.app import MODELS
from ola_vlm.world import language, render

ROOT = Path(__file__).parents[1]
VISITORS = 10
QUESTIONS = 20
# Temperature, top-p, new tokens.
SAMPLING = [0, 1, 16]
MEGABYTE = 2**20


@contextmanager
def running_space():
    """(address, process) of the miniature's Space."""
    with socket.socket() as free:
        # Port 0: the system gives one that is free. It is given back here, for the Space to take.
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as uploads:
        # Without the Space's own settings: it shows the miniature, whatever is set in this shell.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("OLA_VLM_")}
        environment["GRADIO_SERVER_PORT"] = str(port)
        environment["GRADIO_TEMP_DIR"] = uploads
        command = [sys.executable, "space/app.py"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, **quiet)
        try:
            # It has loaded its models when it answers; if it ends before, nobody would ever answer.
            while True:
                if process.poll() is not None:
                    raise SystemExit("space/app.py ended: start it by hand to see why")
                try:
                    httpx.get(f"http://127.0.0.1:{port}/")
                    break
                except httpx.ConnectError:
                    time.sleep(1)
            yield f"http://127.0.0.1:{port}", psutil.Process(process.pid)
        finally:
            process.terminate()
            process.wait(30)


class Visitor:
    """One who asks about one picture."""

    def __init__(self, address: str, picture: bytes):
        # No time limit: a question may wait for all others.
        self.http = httpx.Client(base_url=f"{address}/gradio_api", timeout=None)
        (path,) = self.http.post("/upload", files={"files": ("scene.png", picture)}).json()
        self.file = {"path": path, "meta": {"_type": "gradio.FileData"}}

    def arguments(self, question: str, pictures: int = 1) -> list:
        # Arguments of `Handlers.answer`: models to compare with (none), sampling, a chat for each model.
        content = [{"type": "file", "file": self.file}] * pictures
        content = [*content, {"type": "text", "text": question}]
        chats = [[{"role": "user", "content": content}], *([] for _ in MODELS[1:])]
        return [[], *SAMPLING, *chats]

    def queue(self, question: str, pictures: int = 1) -> str | None:
        """The event's id; None if the Space refuses it."""
        sent = self.http.post("/call/answer", json={"data": self.arguments(question, pictures)})
        return sent.json()["event_id"] if sent.status_code == 200 else None

    def result(self, event: str | None) -> str | None:
        """The answer; None if there was none."""
        if event is None:
            return None
        # Server-sent events: lines "event: NAME", each followed by "data: JSON".
        lines = self.http.get(f"/call/answer/{event}").text.splitlines()
        events = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
        if events[-1] != "complete":
            return None
        data = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
        # Of the last event the first model's chat, and of that the last message.
        answer = data[-1][0][-1]
        return answer["content"][0]["text"]

    def skip_queue(self, question: str) -> int:
        """The HTTP status of a request past the queue."""
        return self.http.post("/run/answer", json={"data": self.arguments(question)}).status_code


def png(image: Image.Image) -> bytes:
    image.save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


def expected_answer(chat: Chat, image: Image.Image, question: str) -> str:
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    pieces = chat.stream([{"role": "user", "content": content}], max_new_tokens=SAMPLING[-1])
    answer = "".join(pieces)
    # The Space adds to an option's letter what the option says.
    return answer + option_words(question, answer)


def visit(visitor: Visitor, questions: list[str]) -> list[str | None]:
    """All are queued before the first answer is fetched."""
    events = [visitor.queue(question) for question in questions]
    return [visitor.result(event) for event in events]


def processor_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def main() -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--rounds", type=int, default=4)
    args = parser.parse_args()

    scenes = render.sample_scenes(VISITORS, seed=0)
    images = [Image.fromarray(image) for image in render.render_scenes(scenes)["image"]]
    # The truth to compare with: the same model in this process, a question at a time.
    chat = Chat.load(str(ROOT / "miniature" / "weights" / MODELS[0]))
    questions = []
    expected = []
    for i, image in enumerate(images):
        asked = [*language.questions(scenes, i), *language.fetch_questions(scenes, i)]
        # A scene that has fewer than `QUESTIONS` is asked some of them again.
        texts = [question["question"] for question in asked]
        questions.append([texts[k % len(texts)] for k in range(QUESTIONS)])
        answers = {text: expected_answer(chat, image, text) for text in set(questions[i])}
        expected.append([answers[text] for text in questions[i]])

    with running_space() as (address, process):
        visitors = [Visitor(address, png(image)) for image in images]
        print(f"{VISITORS} visitors, {VISITORS * QUESTIONS} questions queued at once")
        print(f"{'round':>6}{'answered':>10}{'mixed up':>10}{'lost':>6}{'processor s':>13}{'MB after':>10}")
        for number in range(1, args.rounds + 1):
            before = processor_seconds(process)
            # All visitors at once, each with a thread of its own.
            with ThreadPoolExecutor(VISITORS) as pool:
                told = list(pool.map(visit, visitors, questions))
            pairs = []
            for answers, right in zip(told, expected, strict=True):
                pairs += zip(answers, right, strict=True)
            # No answer at all, and one that isn't the model's to this question and picture.
            lost = sum(answer is None for answer, _ in pairs)
            mixed = sum(answer is not None and answer != right for answer, right in pairs)
            used = processor_seconds(process) - before
            memory = process.memory_info().rss / MEGABYTE
            print(f"{number:>6}{len(pairs) - lost:>10}{mixed:>10}{lost:>6}{used:>13.1f}{memory:>10.0f}")

        # Gradio answers /run at once, past the queue: the Space has to refuse it (404).
        with ThreadPoolExecutor(40) as pool:
            statuses = list(pool.map(visitors[0].skip_queue, [questions[0][0]] * 40))
        print(f"\n40 requests past the queue: {statuses.count(404)} refused, {statuses.count(200)} answered")

        # Just below the most pixels that the Space takes: small as a file, 196 MB once decoded.
        large = png(Image.new("RGBA", (7000, 7000)))
        bomber = Visitor(address, large)
        before = processor_seconds(process)
        answer = bomber.result(bomber.queue("what is there", pictures=16))
        used = processor_seconds(process) - before
        memory = process.memory_info().rss / MEGABYTE
        outcome = "refused" if answer is None else "answered"
        size = f"a PNG of {len(large) // 1000} kB and 49 million pixels"
        print(f"{size}, named 16 times: {outcome}, {used:.1f} processor s, {memory:.0f} MB after")
        before = processor_seconds(process)
        bomber.result(bomber.queue("what is there"))
        print(f"named once: {processor_seconds(process) - before:.1f} processor s")


if __name__ == "__main__":
    main()
