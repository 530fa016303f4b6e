from __future__ import annotations

import csv
import gzip
import json
import math
from pathlib import Path

import pytest
from tests.client.test_generate import watched
from tests.evaluate.bare_view import BareView
from tests.tiny import tiny_model, tiny_tokenizer

from fedloom import recipe as recipes
from fedloom.client.likelihood import Likelihood
from fedloom.evaluate.choice import Choice, Question
from fedloom.evaluate.code_match import CodeMatch
from fedloom.evaluate.mmlu import Mmlu
from fedloom.evaluate.pubmedqa import PubMedQa
from fedloom.evaluate.truthfulqa import TruthfulQa
from fedloom.types import DataError, RecipeError


def view() -> BareView:
    return BareView(tiny_model(), tiny_tokenizer())


def likely(*logs: float) -> list[Likelihood]:
    return [Likelihood(log, 1, False) for log in logs]


def mmlu_folder(path: Path) -> Path:
    """Two subjects of five worked examples and six questions each."""
    for name, count in (("dev", 5), ("test", 6)):
        rows = [
            {"subject": s, "question": f"{s} {name} {i}?", "choices": ["w", "x", "y", "z"], "answer": i % 4}
            for s in ("abstract_algebra", "world_religions")
            for i in range(count)
        ]
        (path / f"mmlu_{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return path


def truthful(path: Path) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["Question", "Best Answer", "Correct Answers", "Incorrect Answers"])
        writer.writerow(["What is it?", "A", "A; B", "C; A; D"])
        writer.writerow(["And that?", "E", "F", "G"])
    return path


def test_mmlu_prompts_are_those_of_the_literature(tmp_path: Path) -> None:
    [*_, last] = Mmlu(path=mmlu_folder(tmp_path), limit=None, shots=2).questions("test", 0)
    assert last.context == (
        "The following are multiple choice questions (with answers) about world religions.\n\n"
        "world_religions dev 0?\nA. w\nB. x\nC. y\nD. z\nAnswer: A\n\n"
        "world_religions dev 1?\nA. w\nB. x\nC. y\nD. z\nAnswer: B\n\n"
        "world_religions test 5?\nA. w\nB. x\nC. y\nD. z\nAnswer:"
    )
    assert (last.choices, last.right, last.group) == ((" A", " B", " C", " D"), (1,), "world_religions")


def test_mmlu_equals_one_question_at_a_time(tmp_path: Path) -> None:
    part, seen = Mmlu(path=mmlu_folder(tmp_path), limit=7, shots=1), view()
    found = part.evaluate(seen)
    hits: dict[str, list[bool]] = {}
    for question in part.questions("test", 0):
        logs = [seen.likelihoods(None, [(question.context, choice)])[0].logprob for choice in question.choices]
        hits.setdefault(question.group, []).append(logs.index(max(logs)) in question.right)
    assert found.metrics["accuracy"] == pytest.approx(sum(map(sum, hits.values())) / 7)
    for subject, own in hits.items():
        assert found.metrics[f"accuracy/{subject}"] == pytest.approx(sum(own) / len(own))
    assert len(found.samples) == 7
    assert found.settings == {"items": 7}


def test_mmlu_reads_the_examples_of_a_subject_once_and_each_question_once(tmp_path: Path) -> None:
    seen = view()
    with watched(seen.base) as shapes:
        Mmlu(path=mmlu_folder(tmp_path), limit=None).evaluate(seen)
    assert [rows for rows, _ in shapes] == [1, 6, 1, 6]
    assert shapes[0][1] > 5 * shapes[1][1]


def test_mmlu_subjects_and_their_near_names(tmp_path: Path) -> None:
    folder = mmlu_folder(tmp_path)
    assert {q.group for q in Mmlu(path=folder, subjects=("world_religions",)).questions("test", 0)} == {
        "world_religions"
    }
    with pytest.raises(DataError, match="no subject of MMLU named 'world_religion'; did you mean 'world_religions'"):
        Mmlu(path=folder, subjects=("world_religion",)).questions("test", 0)


def test_questions_of_the_course_are_none_of_the_end(tmp_path: Path) -> None:
    part = Mmlu(path=mmlu_folder(tmp_path), limit=6)
    course, end = ({q.id for q in part.questions(split, 0)} for split in ("validation", "test"))
    assert len(course) == len(end) == 6
    assert not course & end
    assert {q.id for q in part.questions("test", 1)} != end
    with pytest.raises(DataError, match=r"all 12 items are kept for the end.*set limit to at most 6, or every: 0"):
        Mmlu(path=tmp_path, limit=None).questions("validation", 0)


def test_what_a_file_lacks_is_told_with_its_place(tmp_path: Path) -> None:
    mmlu_folder(tmp_path)
    (tmp_path / "mmlu_test.jsonl").write_text('{"subject": "a", "question": "b", "choices": []}\n')
    with pytest.raises(DataError, match=r"1 records cannot be read\n  line 1: lacks answer \(has: subject, question"):
        Mmlu(path=tmp_path).questions("test", 0)
    (tmp_path / "mmlu_test.jsonl").write_text('{"subject": "a", "question": "b", "choices": [1], "answer": 0}\n')
    with pytest.raises(DataError, match="record 1: needed: four choices and an answer from 0 to 3"):
        Mmlu(path=tmp_path).questions("test", 0)
    (tmp_path / "mmlu_test.jsonl").unlink()
    with pytest.raises(DataError, match=r"holds no mmlu_test\.jsonl"):
        Mmlu(path=tmp_path).questions("test", 0)


def test_data_that_are_nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEDLOOM_DATA", str(tmp_path))
    with pytest.raises(
        DataError, match=r"evaluator mmlu: its data are not below .*put the file at \$FEDLOOM_DATA/mmlu"
    ):
        Mmlu().questions("test", 0)
    with pytest.raises(DataError, match="evaluator pubmedqa: no such file: /no/where"):
        PubMedQa(path=Path("/no/where")).questions("test", 0)


def test_truthfulqa_reads_the_authors_table(tmp_path: Path) -> None:
    first, second = TruthfulQa(path=truthful(tmp_path / "t.csv")).questions("test", 0)
    assert (first.context, first.choices, first.right) == ("Q: What is it?\nA:", (" A", " B", " C", " D"), (0, 1))
    assert (second.choices, second.right) == ((" E", " F", " G"), (0, 1))
    primer = tmp_path / "primer.txt"
    primer.write_text("Q: One?\nA: Two.\n")
    primed, _ = TruthfulQa(path=tmp_path / "t.csv", primer=primer).questions("test", 0)
    assert primed.context == "Q: One?\nA: Two.\n\nQ: What is it?\nA:"


def test_truthfulqa_by_hand() -> None:
    question = Question("x", "all", "", ("a", "b", "c"), (0, 1))
    part = TruthfulQa()
    logs = [math.log(p) for p in (0.2, 0.1, 0.1)]
    assert part.scores([question], [likely(*logs)]) == {"mc1": 1.0, "mc2": pytest.approx(0.75)}
    logs = [math.log(p) for p in (0.2, 0.5, 0.1)]  # another true answer may be likelier
    assert part.scores([question], [likely(*logs)]) == {"mc1": 1.0, "mc2": pytest.approx(7 / 8)}
    logs = [math.log(p) for p in (0.1, 0.5, 0.2)]  # the best answer itself must be the likelier one
    assert part.scores([question], [likely(*logs)]) == {"mc1": 0.0, "mc2": pytest.approx(0.75)}
    assert part.scores([question], [likely(-2000.0, -2000.0, -2000.0)])["mc2"] == pytest.approx(2 / 3)


def test_pubmedqa_asks_the_test_half_alone(tmp_path: Path) -> None:
    record = {"QUESTION": "Is it?", "CONTEXTS": ["It is.", "So there."]}
    with gzip.open(tmp_path / "ori_pqal.json.gz", "wt") as file:
        json.dump({"1": record, "2": record, "3": record}, file)
    (tmp_path / "test_ground_truth.json").write_text('{"2": "maybe"}')
    [only] = PubMedQa(path=tmp_path).questions("test", 0)
    assert (only.id, only.right, only.choices) == ("pubmedqa-2", (2,), (" yes", " no", " maybe"))
    assert only.context == "Abstract: It is.\nSo there.\nQuestion: Is it?\nAnswer:"
    (tmp_path / "test_ground_truth.json").write_text("{")
    with pytest.raises(DataError, match=r"test_ground_truth.json: damaged or not JSON"):
        PubMedQa(path=tmp_path).questions("test", 0)


def test_macro_f1_by_hand() -> None:
    questions = [Question(str(i), "all", "", ("y", "n", "m"), (gold,)) for i, gold in enumerate((0, 0, 1))]
    said = [likely(0, -1, -1), likely(-1, 0, -1), likely(-1, 0, -1)]
    found = PubMedQa().scores(questions, said)
    assert found == {"accuracy": pytest.approx(2 / 3), "macro_f1": pytest.approx((2 / 3 + 2 / 3) / 2)}


def test_code_match(tmp_path: Path) -> None:
    file = tmp_path / "pairs.json"
    file.write_text(
        json.dumps([{"doc": "add", "code": "def f(): ...", "label": 1}, {"doc": "b", "code": "c", "label": 0}])
    )
    part = CodeMatch(path=file)
    assert [(q.choices, q.right) for q in part.questions("test", 0)] == [
        ((" no", " yes"), (1,)),
        ((" no", " yes"), (0,)),
    ]
    assert set(part.evaluate(view()).metrics) == {"accuracy"}
    file.write_text(json.dumps([{"doc": "add", "code": "x", "label": "yes"}]))
    with pytest.raises(DataError, match="record 1: label is 'yes'; allowed: 0 and 1"):
        part.questions("test", 0)


def test_the_first_of_equals_is_chosen() -> None:
    question = Question("x", "all", "", ("a", "b"), (1,))
    assert Choice().scores([question], [likely(-1, -1)]) == {"accuracy": 0.0}


def test_an_unknown_evaluator_lists_near_names() -> None:
    with pytest.raises(RecipeError, match="no evaluator named 'mmul'; did you mean 'mmlu'"):
        recipes.load({"evaluate": ["mmul"]})


@pytest.mark.data
def test_the_real_files(data_home: Path) -> None:
    assert len(Mmlu(limit=None).questions("test", 0)) == 14042
    questions = TruthfulQa(limit=None).questions("test", 0)
    assert len(questions) == 790
    assert all(0 < len(q.right) < len(q.choices) == len(set(q.choices)) for q in questions)
    assert len(PubMedQa(limit=None).questions("test", 0)) == 500
