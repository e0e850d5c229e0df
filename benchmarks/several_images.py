"""What the predictors cost where one row has several images: `python benchmarks/several_images.py`.

1, 2, 4 and 8 images in one row against as many rows of one image, forward and backward of the paper's three tasks on
one layer each. Prints FLOPs, what autograd keeps, and processor seconds, each by image.
"""

import argparse
import time
from itertools import chain

import torch
from plan import count, student_config

from ola_vlm.configuration_ola_vlm import default_tasks
from ola_vlm.modeling_ola_vlm import ImageLayout, OlaVlmForConditionalGeneration

# As small as can be: only the predictors are run, on random states.
TOWER = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
WORDS = 60  # of a row
REPETITIONS = 3


def make_model(hidden_size: int) -> OlaVlmForConditionalGeneration:
    llm = {
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        # One, as the tasks name layer 1: it is never run, the states are random.
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "vocab_size": 1000,
    }
    tasks = [{**task, "layers": [1]} for task in default_tasks()]
    return OlaVlmForConditionalGeneration(student_config(llm, TOWER, tasks))


def measure(model: OlaVlmForConditionalGeneration, rows: int, images: int) -> tuple[float, float, float]:
    """FLOPs, bytes kept and processor seconds by image, for `rows` of `images` each."""
    config = model.config
    # An image's tokens and its task tokens, between words (5 and 6 stand for any).
    of_image = [config.image_token_id] * config.image_seq_length + config.task_token_ids
    ids = torch.tensor([5] * (WORDS // 2) + of_image * images + [6] * (WORDS // 2)).expand(rows, -1)
    # Which tokens belong to which image, as the model's forward finds it.
    layout = ImageLayout.find(ids, torch.ones_like(ids), rows * images, config)
    states = torch.randn(*ids.shape, config.text_config.hidden_size, requires_grad=True)

    def step():
        # Task -> layer -> (N, Q, E), of which any loss will do: all of the backward pass runs.
        predictions = model.predict_embeddings({1: states}, layout)
        of_layers = chain.from_iterable(of_task.values() for of_task in predictions.values())
        total = sum(prediction.square().mean() for prediction in of_layers)
        total.backward()

    # Bytes kept for the backward pass, without the weights: what grows with the images.
    flops, kept = count(step, left_out=list(model.parameters()))
    seconds = []
    for _ in range(REPETITIONS):
        start = time.process_time()
        step()
        seconds.append(time.process_time() - start)
    total = rows * images
    return flops / total, kept / total, min(seconds) / total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden_size", type=int, default=256, help="the language model's width")
    parser.add_argument("--images", type=int, nargs="+", default=[1, 2, 4, 8], help="numbers of images to measure")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = make_model(args.hidden_size)
    print("by image:               GFLOPs   MB kept   processor seconds")
    for images in args.images:
        # The same number of images in one row and in rows of one; 1 image is both.
        for rows, of_row in dict.fromkeys([(1, images), (images, 1)]):
            flops, kept, seconds = measure(model, rows, of_row)
            shape = f"{rows} row{'s' * (rows > 1)} of {of_row} image{'s' * (of_row > 1)}"
            print(f"{shape:<22} {flops / 1e9:7.2f}   {kept / 1e6:7.1f}   {seconds:.2f}", flush=True)


if __name__ == "__main__":
    main()
