"""The questions on the page's cards: rendered scenes, asked about in the words of the model that is shown."""

from pathlib import Path

import numpy as np
from PIL import Image

from ..world import language, render

# Kinds of the miniature's questions, the surest first.
KINDS = ("depth", "relation", "count", "distance")


def render_scenes(count: int) -> tuple[render.Scenes, list[Image.Image]]:
    """About `count` scenes of the miniature's world all of whose objects can be seen."""
    # In some an object hides another one: a few more are drawn than are wanted.
    drawn = render.sample_scenes(int(count * 1.2) + 4, seed=11)
    arrays = render.render_scenes(drawn)
    chosen = np.flatnonzero(render.all_seen(drawn, arrays["visible"]))[:count]
    images = [Image.fromarray(arrays["image"][i]) for i in chosen]
    return drawn[chosen], images


def make_examples(drawn: render.Scenes, images: list[Image.Image], folder: Path, own_words: bool) -> list[dict]:
    """A message for each image, with its file in `folder`, what a card shows of it and the right answer; `own_words`:
    the miniature's own questions, else LLaVA's multiple-choice form and, for every second image, a description."""
    examples = []
    for i, image in enumerate(images):
        path = folder / f"scene_{i}.png"
        if not own_words:
            # The miniature's scenes are 64 pixels wide, far less than other models are trained on.
            image = image.resize((384, 384), Image.Resampling.BICUBIC)
        image.save(path)
        asked = {question["task"]: question for question in language.questions(drawn, i)}
        kinds = [kind for kind in KINDS if kind in asked]
        # Cards take turns among the kinds that their scene has a question of.
        question = asked[kinds[i % len(kinds)]]
        # The options follow the question mark.
        (shown, _, _) = question["question"].partition(" ?")
        example = {"files": [str(path)], "display_text": f"{shown.capitalize()}?"}
        if own_words:
            example["text"] = question["question"]
            example["truth"] = question["answer"]
        elif i % 2:
            example["text"] = "Describe the image."
            example["display_text"] = "Describe the image."
        else:
            options = [f"{letter}. {option}" for letter, option in zip("ABCD", question["choices"], strict=False)]
            request = "Answer with the option's letter from the given choices directly."
            example["text"] = "\n".join([example["display_text"], *options, request])
            # "(A)" of the miniature is "A" in this form.
            example["truth"] = question["answer"].strip("()")
        examples.append(example)
    return examples
