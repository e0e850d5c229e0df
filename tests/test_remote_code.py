"""A checkpoint folder is enough: a fresh process that can't import the package loads and runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from conftest import encode, random_rows

NO_PACKAGE = """
import importlib.abc, json, sys

class NoPackage(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"ola_vlm", "diffusers", "gradio", "trl", "datasets"}:
            raise ModuleNotFoundError(f"{name} is not here")

sys.meta_path.insert(0, NoPackage())
try:
    import ola_vlm
    raise SystemExit("the package can be imported")
except ModuleNotFoundError:
    pass
"""
SCRIPT = """
import io
import pickle

import torch
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM
from transformers import AutoProcessor, AutoTokenizer, pipeline

folder, batch = sys.argv[1], torch.load(sys.argv[2])
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
assert config.model_type == "ola_vlm" and [task["name"] for task in config.tasks] == ["gen", "depth", "seg"]
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
assert type(processor).__name__ == "OlaVlmProcessor" and len(processor.task_tokens) == 8
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
assert tokenizer.convert_tokens_to_ids("<gen_0>") == config.task_token_ids[0]
assert type(AutoModel.from_pretrained(folder, trust_remote_code=True)).__name__ == "OlaVlmForConditionalGeneration"
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
assert type(AutoModelForMultimodalLM.from_pretrained(folder, trust_remote_code=True)) is type(model)
torch.save(model, saved := io.BytesIO())
saved.seek(0)
for copy in (pickle.loads(pickle.dumps(model)), torch.load(saved, weights_only=False)):
    assert type(copy) is type(model) and copy(**batch["inputs"]).logits.equal(batch["logits"])
with torch.no_grad():
    output = model(**batch["inputs"], output_predictions=True)
assert output.logits.equal(batch["logits"])
assert output.predictions["depth"][1].equal(batch["prediction"])
image = Image.new("RGB", (60, 20), "red")
content = [{"type": "image", "image": image}, {"type": "text", "text": " what is this ?"}]
messages = [{"role": "user", "content": content}]
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
new = model.generate(**inputs, max_new_tokens=4, do_sample=False)
assert new.shape[1] > inputs["input_ids"].shape[1]
pipe = pipeline("image-text-to-text", model=folder, trust_remote_code=True)
answer = pipe(messages, max_new_tokens=4, do_sample=False, return_full_text=False)
assert isinstance(answer[0]["generated_text"], str)
any_to_any = pipeline("any-to-any", model=folder, trust_remote_code=True)
greedy = {"do_sample": False, "max_new_tokens": 4}
assert any_to_any(text=messages, generate_kwargs=greedy, return_full_text=False)[0]["generated_text"] \
    == answer[0]["generated_text"]
model.save_pretrained(sys.argv[3])
again = AutoModelForImageTextToText.from_pretrained(sys.argv[3], trust_remote_code=True).eval()
with torch.no_grad():
    assert again(**batch["inputs"]).logits.equal(batch["logits"])
print(json.dumps({"answer": answer[0]["generated_text"]}))
"""


def environment(home: Path, hub: str | None = None) -> dict[str, str]:
    """A process's: without the Hub, or with the one at `hub`."""
    where = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub, "HF_HUB_DISABLE_XET": "1"} if hub else {"HF_HUB_OFFLINE": "1"}
    # Of its own also where code is kept, which all other tests share.
    kept = {"HF_HOME": str(home), "HF_MODULES_CACHE": str(home / "modules")}
    return {**os.environ, **kept, "OMP_NUM_THREADS": "1", **where}


def run_without_the_package(script: str, folder: Path, *arguments: Path | str, hub: str | None = None) -> str:
    """Runs `script` in a process of its own; returns the last line that it prints."""
    (folder / "use.py").write_text(NO_PACKAGE + script)
    command = [sys.executable, str(folder / "use.py"), *map(str, arguments)]
    options = {"cwd": folder, "env": environment(folder / "home", hub), "capture_output": True, "text": True}
    done = subprocess.run(command, check=False, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "to instantiate a model of type" not in done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_remote_code_in_a_fresh_process(make_model, tmp_path):
    model, processor = make_model()
    folder = tmp_path / "checkpoint"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    inputs = dict(encode(processor, random_rows(2)))
    with torch.no_grad():
        output = model(**inputs, output_predictions=True)
    saved = {"inputs": inputs, "logits": output.logits, "prediction": output.predictions["depth"][1]}
    torch.save(saved, tmp_path / "batch.pt")
    answer = run_without_the_package(SCRIPT, tmp_path, folder, tmp_path / "batch.pt", tmp_path / "again")
    assert "answer" in json.loads(answer)
