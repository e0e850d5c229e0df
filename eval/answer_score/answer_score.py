"""A benchmark's scores as a metric of `evaluate`: `evaluate.load("eval/answer_score", "cvbench")`.

The same numbers as `ola-vlm score` prints, for answers from anywhere.
"""

# one import a line: `evaluate` reads them with a regular expression
import datasets
import evaluate

from ola_vlm.eval.benchmarks import BENCHMARKS
from ola_vlm.eval.scoring import score_records

REFERENCE = {
    "answers": datasets.Sequence(datasets.Value("string")),  # one; OK-VQA ten
    "choices": datasets.Sequence(datasets.Value("string")),  # [] if there are none
    "task": datasets.Value("string"),
    "source": datasets.Value("string"),
    "scoring": datasets.Value("string"),  # choice, exact or vqa
    "pair": datasets.Value("int64"),  # MMVP's pair of questions, elsewhere -1
}


class AnswerScore(evaluate.Metric):
    def _info(self):
        if self.config_name not in BENCHMARKS:
            raise ValueError(f"name a benchmark, of {list(BENCHMARKS)}: evaluate.load(folder, name)")
        return evaluate.MetricInfo(
            description=__doc__ or "",
            citation="",
            inputs_description="predictions: raw answers; references: dicts with " + ", ".join(REFERENCE),
            features=datasets.Features({"predictions": datasets.Value("string"), "references": REFERENCE}),
        )

    def _compute(self, predictions, references):
        records = []
        for number, (output, reference) in enumerate(zip(predictions, references, strict=True)):
            answers = reference["answers"]
            answer = list(answers) if reference["scoring"] == "vqa" else answers[0]
            record = {**reference, "id": str(number), "output": output, "answer": answer}
            if record["pair"] < 0:
                del record["pair"]
            records.append(record)
        scores = score_records(records, self.config_name)
        errors = {f"{name}/standard_error": one["standard_error"] for name, one in scores.items()}
        return {name: one["score"] for name, one in scores.items()} | errors
