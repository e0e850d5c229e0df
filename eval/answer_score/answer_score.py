"""A benchmark's scores as a metric of `evaluate`: `evaluate.load("eval/answer_score", "cvbench")`.

The same numbers as `ola-vlm score` prints, for answers from anywhere.
"""

# One import a line: `evaluate` finds what the metric needs by a regular expression.
import datasets
import evaluate

from ola_vlm.eval.benchmarks import BENCHMARKS
from ola_vlm.eval.scoring import score_records, unscorable

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
# Of 3DSRBench, whose headline counts the variants of a question as one: fields of its questions.
GROUP = {"group": datasets.Value("string"), "group_source": datasets.Value("string")}


class AnswerScore(evaluate.Metric):
    def _info(self):
        if self.config_name not in BENCHMARKS:
            raise ValueError(f"name a benchmark, of {list(BENCHMARKS)}: evaluate.load(folder, name)")
        reference = dict(REFERENCE)
        if self.config_name == "3dsrbench":
            reference.update(GROUP)
        return evaluate.MetricInfo(
            description=__doc__ or "",
            citation="",
            inputs_description="predictions: raw answers; references: dicts with " + ", ".join(reference),
            features=datasets.Features({"predictions": datasets.Value("string"), "references": reference}),
        )

    def add_batch(self, *, predictions=None, references=None, **kwargs):
        """Of `evaluate.Metric`; ValueError for references of other fields, where that one raises a KeyError."""
        fields = self.features["references"].keys()
        for number, reference in enumerate(references or ()):
            if set(reference) != set(fields):
                raise ValueError(f"reference {number} has {', '.join(reference)}: give it {', '.join(fields)}")
        super().add_batch(predictions=predictions, references=references, **kwargs)

    def _compute(self, predictions, references):
        records = []
        for number, (output, reference) in enumerate(zip(predictions, references, strict=True)):
            answers = reference["answers"]
            # VQA's scores need all ten answers, others the one.
            answer = list(answers)
            if reference["scoring"] != "vqa" and len(answers) == 1:
                answer = answers[0]
            record = {**reference, "id": str(number), "output": output, "answer": answer}
            # A column of texts has no None: a question of no source has "".
            record["source"] = reference["source"] or None
            # Else whatever is said would be wrong.
            wrong = [f"{name} {record[name]!r:.80}" for name in unscorable(record)]
            if wrong:
                raise ValueError(f"reference {number} can't be scored by its {' and '.join(wrong)}")
            # Scoring looks for the key, not at its value.
            if record["pair"] < 0:
                del record["pair"]
            records.append(record)
        scores = score_records(records, self.config_name)
        metrics = {name: scored["score"] for name, scored in scores.items()}
        for name, scored in scores.items():
            metrics[f"{name}/standard_error"] = scored["standard_error"]
        return metrics
