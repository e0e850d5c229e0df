"""Parallel processes of one thread each, with one bar for all of them."""

import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

POLL_SECONDS = 1.0


class Job(NamedTuple):
    """`python -m module argument`; in `folder` lie its log.txt and `progress`, its share done from 0 to 1."""

    folder: Path
    module: str
    argument: str


def run_jobs(
    jobs: Mapping[tuple, Job], workers: int, what: str, done: Callable[[], object] = lambda: None, finished: int = 0
) -> None:
    """Runs the jobs, `workers` at a time, in their order; `done` is called as one has ended. `finished`: how many are
    done already, for the bar. RuntimeError with the end of a job's log when it fails; the others are stopped."""
    # One thread each: with more, processes would wait for each other.
    waiting = list(jobs)
    running: dict[tuple, subprocess.Popen] = {}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    total = 100 * (len(jobs) + finished)
    bar = tqdm(total=total, desc=f"{what}s", bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}")
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                name = waiting.pop(0)
                job = jobs[name]
                command = [sys.executable, "-m", job.module, job.argument]
                job.folder.mkdir(parents=True, exist_ok=True)
                # Appended to: the log of an interrupted attempt stays.
                with (job.folder / "log.txt").open("ab") as log:
                    running[name] = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
            # How far all are.
            time.sleep(POLL_SECONDS)
            files = [job.folder / "progress" for job in jobs.values()]
            shares = [file.read_text() for file in files if file.exists()]
            bar.n = 100 * (finished + sum(float(share or 0) for share in shares))
            bar.set_postfix_str(", ".join(" ".join(map(str, name)) for name in running))
            # Which have ended.
            for name in [name for name, process in running.items() if process.poll() is not None]:
                if running.pop(name).returncode:
                    log = (jobs[name].folder / "log.txt").read_text(errors="replace")
                    raise RuntimeError(f"{what} {name} failed; the end of its log:\n{log[-3000:]}")
                done()
    finally:
        bar.close()
        # All are told first and then waited for: they end side by side.
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()


def peak_memory_mb() -> float:
    """Of this process since it began."""
    status = Path("/proc/self/status")
    # getrusage also counts what the parent had come to when it started this process; /proc, which Linux has, does not.
    if status.exists():
        (peak,) = re.findall(r"^VmHWM:\s*(\d+) kB$", status.read_text(), re.MULTILINE)
        return int(peak) / 1024
    # On macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
