"""A benchmark's scores as a metric of `evaluate`: `evaluate.load("eval/answer_score", "cvbench")`.

The same numbers as `ola-vlm score` prints, for answers from anywhere.
"""

# One import a line: `evaluate` finds what the metric needs by a regular expression.
import datasets
import evaluate

from ola_vlm.eval.benchmarks import BENCHMARKS
from ola_vlm.eval.scoring import score_records

# Arrow's columns have one type each: answers are always a list, and a missing pair is a number, too.
REFERENCE = {
    "answers": datasets.Sequence(datasets.Value("string")),  # one; OK-VQA ten
    # [] if there are none.
    "choices": datasets.Sequence(datasets.Value("string")),
    "task": datasets.Value("string"),
    "source": datasets.Value("string"),
    # A key of `scoring.SCORERS`: choice, exact or vqa.
    "scoring": datasets.Value("string"),
    # MMVP's pair of questions, elsewhere -1.
    "pair": datasets.Value("int64"),
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
            # VQA's scores need all ten answers, others the one.
            answer = list(answers) if reference["scoring"] == "vqa" else answers[0]
            record = {**reference, "id": str(number), "output": output, "answer": answer}
            # Scoring looks for the key, not at its value.
            if record["pair"] < 0:
                del record["pair"]
            records.append(record)
        scores = score_records(records, self.config_name)
        metrics = {name: scored["score"] for name, scored in scores.items()}
        for name, scored in scores.items():
            metrics[f"{name}/standard_error"] = scored["standard_error"]
        return metrics
