"""Our checkpoints in lmms-eval, unforked: `lmms_eval --model ola_vlm --model_args pretrained=CHECKPOINT --tasks ...`.

lmms-eval finds `manifest` by the entry point `lmms_eval.models`; only it imports this file. docs/evaluation.md.
"""

import torch
from accelerate import Accelerator
from lmms_eval import utils  # pyright: ignore[reportMissingImports] (in an environment of its own: make lmms-eval)
from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports] (the same)
from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports] (the same)
from lmms_eval.protocol import ChatMessages  # pyright: ignore[reportMissingImports] (the same)
from tqdm import tqdm

from ..inference.checkpoints import load_checkpoint
from ..inference.generate import answer_chats

# Settings of a task that `generate` takes; others are the harness's own.
GENERATION = ("do_sample", "temperature", "top_p", "top_k", "num_beams", "max_new_tokens", "repetition_penalty")


def manifest() -> ModelManifest:
    return ModelManifest(model_id="ola_vlm", chat_class_path=f"{__name__}.OlaVlm")


def generation_options(settings: dict) -> dict:
    """A task's settings as options of `generate`: greedy ones without those of sampling."""
    # For a task that names no length: the harness's own default.
    options = {"max_new_tokens": 1024}
    options.update({name: settings[name] for name in GENERATION if settings.get(name) is not None})
    # Tasks that name a temperature above 0 and no do_sample mean to sample.
    options["do_sample"] = bool(options.get("do_sample", options.get("temperature", 0) > 0))
    # transformers warns of options of sampling where none is done.
    if not options["do_sample"]:
        for name in ("temperature", "top_p", "top_k"):
            options.pop(name, None)
    return options


class OlaVlm(lmms):
    """Any checkpoint that `ola-vlm eval` takes.

    Args:
        pretrained: folder, or name on the Hub.
        batch_size: conversations at once.
        dtype, device_map, trust_remote_code: of `load_checkpoint`.
        device, max_batch_size: of lmms-eval's command line; the device is this process's own.
    """

    # Those that are simple for lmms-eval get text and images apart; this one gets messages.
    is_simple = False

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        dtype: str = "auto",
        device_map: str | None = None,
        trust_remote_code: bool = False,
        device: str | None = None,
        max_batch_size: int | None = None,
    ):
        super().__init__()
        # The command line also takes "auto", which wants a search for the largest batch.
        if not str(batch_size).isdigit():
            raise ValueError(f"batch_size {batch_size!r}: give a number")
        self.batch_size = int(batch_size)
        self.accelerator = Accelerator(cpu=not torch.accelerator.is_available())
        # By these the harness divides the requests among processes, and gathers their answers.
        self._rank = self.accelerator.process_index
        self._world_size = self.accelerator.num_processes
        self.model, self.processor = load_checkpoint(pretrained, dtype, device_map, trust_remote_code)
        self.model.eval()

    @property
    def device(self) -> torch.device:
        return self.model.device

    def generate_until(self, requests) -> list[str]:
        """An answer to each request, in batches of alike settings; cut where one of its "until" strings begins."""
        # It groups requests by their settings, which a batch shares, and puts answers back into their order.
        collator = utils.Collator(
            [request.args for request in requests],
            # Sorted by the length of the context, so that alike lengths share a batch.
            lambda args: (len(args[0]), args[0]),
            group_fn=lambda args: args[2],
            grouping=True,
        )
        answers = []
        bar = tqdm(total=len(requests), desc="answering", unit="question", disable=self.rank != 0)
        for batch in collator.get_batched(n=self.batch_size, batch_fn=None):
            # A request's arguments: context, messages of a row, settings, row, task, split.
            chats = [self._messages(args[1], *args[3:]) for args in batch]
            settings = dict(batch[0][2])
            # A task's YAML may say `until: null`.
            until = settings.pop("until", None) or []
            if isinstance(until, str):
                until = [until]
            options = generation_options(settings)
            for answer in answer_chats(self.model, self.processor, chats, **options):
                # The earliest of the strings; None is the answer's own end.
                ends = [answer.find(stop) for stop in until if stop in answer]
                answers.append(answer[: min(ends, default=None)])
            bar.update(len(batch))
        bar.close()
        return collator.get_original(answers)

    def _messages(self, doc_to_messages, doc_id: int, task: str, split: str) -> list[dict]:
        messages = ChatMessages(messages=doc_to_messages(self.task_dict[task][split][doc_id]))
        media = messages.extract_media()
        videos = media[1]
        sounds = media[2]
        if videos or sounds:
            raise ValueError(f"{task}: videos and sound can't be shown to this model, choose tasks with images")
        return messages.to_hf_messages()

    def loglikelihood(self, requests):
        raise NotImplementedError("this model answers in words: choose tasks whose output_type is generate_until")

    def generate_until_multi_round(self, requests):
        raise NotImplementedError("tasks of several rounds want a harness of their own: choose others")
