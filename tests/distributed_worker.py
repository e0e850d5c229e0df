"""One rank of test_distributed: torchrun ... distributed_worker.py PARTS_FOLDER OUT_FOLDER."""

import contextlib
import sys
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from conftest import random_rows, tiny_tasks
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from training_helpers import IMAGES, GroupedRows, Interrupt, ListStream, losses, make_trainer, weights

from ola_vlm.convert.parts import build_ola_vlm
from ola_vlm.training.check import check_rows
from ola_vlm.training.collator import OlaVlmCollator
from ola_vlm.training.rows import BadRow, StreamRows
from ola_vlm.training.sharding import block_classes

RUNS = [("pretrain", 1), ("pretrain", 2), ("finetune", 1)]  # stage, accumulated micro-batches


BAD = (4, 5, 6, 7, 9)  # with 4 rows a rank, all rows of the second rank's first batch
SGD = {"optim": "sgd", "learning_rate": 0.1}


def build(parts: Path):
    torch.manual_seed(0)
    return build_ola_vlm(str(parts / "vision_tower"), str(parts / "language_model"), tasks=tiny_tasks())


def save(trainer, path: Path, **more):
    if trainer.args.should_save:
        torch.save({"losses": losses(trainer), "weights": weights(trainer.model), **more}, path)


def run(parts: Path, out: Path, stage: str, ranks: int, accumulation: int):
    """Three SGD steps on 8 rows each, however they are split; saves losses and weights."""
    model, processor = build(parts)
    trainer = make_trainer(
        model,
        processor,
        out,
        rows=random_rows(16, IMAGES),
        stage=stage,
        max_steps=3,
        per_device_train_batch_size=8 // ranks // accumulation,
        per_device_eval_batch_size=8 // ranks,
        gradient_accumulation_steps=accumulation,
        train_sampling_strategy="sequential",
        **SGD,
    )
    # Before training: DDP must be set up nevertheless. Of the second batch the second of two ranks has no row.
    metrics = trainer.evaluate(trainer.train_dataset[:11])
    predicted = trainer.predict(trainer.train_dataset[:11])
    # Where a batch is padded depends on its rows.
    logits = np.where(predicted.label_ids[..., None] == -100, 0, predicted.predictions)
    trainer.train()
    evaluated = {name: value for name, value in metrics.items() if name.startswith("eval_loss")}
    save(trainer, out / f"{stage}-{accumulation}.pt", eval=evaluated, logits=torch.from_numpy(logits))


def run_bad_rows(parts: Path, out: Path, ranks: int):
    """Two steps; in the first, the second of two ranks has nothing left."""
    rows = random_rows(16, IMAGES)
    for i in BAD:
        rows[i] = {"id": f"row-{i}", "bad_row": BadRow("missing", "gone")}
    options = {"max_steps": 2, "per_device_train_batch_size": 8 // ranks, "train_sampling_strategy": "sequential"}
    options |= {"drop_bad_rows": True, "max_bad_rows": 0.5, **SGD}
    trainer = make_trainer(*build(parts), out, rows=rows, **options)
    trainer.train()
    save(trainer, out / "bad_rows.pt", bad_rows=trainer.bad_rows)


def run_stream(parts: Path, out: Path, ranks: int):
    options = {"max_steps": 3, "per_device_train_batch_size": 8 // ranks, "streaming": True, **SGD}
    trainer = make_trainer(*build(parts), out, rows=StreamRows(ListStream(), out), **options)
    trainer.train()
    save(trainer, out / "stream.pt")


def run_packed(parts: Path, out: Path, ranks: int):
    """Two epochs of 8 sequences, in steps of 4, of which the ranks have unequally many rows and images. Then of 7:
    the last step of an epoch isn't full."""
    rows = random_rows(16, IMAGES)
    groups = [[0, 1], [2], [3, 4, 5], [6, 7], [8, 9, 10], [12], [11, 13], [14, 15]]
    packed = [[rows[i] for i in group] for group in groups]
    options = {"max_steps": 4, "per_device_train_batch_size": 4 // ranks, "train_sampling_strategy": "sequential"}
    trainer = make_trainer(*build(parts), out, rows=packed, **options, **SGD)
    trainer.train()
    uneven = make_trainer(*build(parts), out, rows=packed[:7], **options, **SGD)
    uneven.train()
    save(trainer, out / "packed.pt", uneven=losses(uneven))


def run_check(parts: Path, out: Path):
    """Each rank looks at every other one of 15 rows; all know all."""
    rows = random_rows(15, IMAGES[:15])
    for i in (4, 7):  # one of each rank
        rows[i] = {"id": f"row-{i}", "bad_row": BadRow("missing", "gone")}
    report = check_rows(rows, OlaVlmCollator(build(parts)[1]))
    numbers = [report.problem, report.tokens, report.truncated, report.images, report.answers]
    rank = PartialState().process_index
    torch.save({"numbers": torch.tensor(np.array(numbers)), "named": report.named}, out / f"check-{rank}.pt")


def resume_grouped(parts: Path, out: Path):
    """Interrupted in the second epoch of 4 steps and resumed, the ranks draw the batches of an uninterrupted run."""
    options = {"rows": GroupedRows(random_rows(16, IMAGES)), "max_steps": 10, "per_device_train_batch_size": 2}
    options |= {"train_sampling_strategy": "group_by_length", "save_strategy": "steps", "save_steps": 1}
    whole = make_trainer(*build(parts), out / "whole", **options)
    whole.train()
    interrupted = make_trainer(*build(parts), out / "cut", callbacks=[Interrupt(7)], **options)
    with contextlib.suppress(KeyboardInterrupt):
        interrupted.train()
    resumed = make_trainer(*build(parts), out / "cut", **options)
    resumed.train(resume_from_checkpoint=str(out / "cut" / "checkpoint-6"))
    save(resumed, out / "grouped.pt", whole=losses(whole))


def run_sharded(parts: Path, out: Path, ranks: int, stage: str):
    """Two SGD steps, by `fully_shard` if there are several ranks (the trainer itself shards on GPUs only); saves
    what a sharded run saves."""
    model, processor = build(parts)
    trainer = make_trainer(model, processor, out, stage=stage)
    model.train()
    if ranks > 1:
        mesh = init_device_mesh("cpu", (ranks,))
        names = block_classes(model)  # the tower's as well, which a rank without an image must run
        for block in [module for module in model.modules() if type(module).__name__ in names]:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    rank, size, logged = trainer.args.process_index, 8 // ranks, []
    for step in range(2):
        rows = trainer.train_dataset[8 * step + size * rank :][:size]
        batch = trainer.data_collator(rows)
        supervised = trainer.accelerator.gather((batch["labels"][:, 1:] != -100).sum()[None]).sum()
        loss = trainer.compute_loss(model, batch, num_items_in_batch=supervised)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        logged.append({"loss": trainer.accelerator.reduce(loss.detach(), "mean").item()})
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:  # which alone has it
        if stage == "pretrain":
            model.write_task_tokens(state)
        torch.save({"losses": logged, "weights": state}, out / f"sharded-{stage}.pt")


if __name__ == "__main__":
    parts, out = Path(sys.argv[1]), Path(sys.argv[2])
    for stage, accumulation in RUNS:
        run(parts, out, stage, ranks=2, accumulation=accumulation)
    run_bad_rows(parts, out, ranks=2)
    run_stream(parts, out, ranks=2)
    run_packed(parts, out, ranks=2)
    run_check(parts, out)
    resume_grouped(parts, out)
    for stage in ("pretrain", "finetune"):
        run_sharded(parts, out, ranks=2, stage=stage)
    torch.distributed.destroy_process_group()
