"""Named sets: well-known data found as an explicit file, below $FEDLOOM_DATA, or on the hub, in this order."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, NonNegativeInt

from fedloom.data.files import Record, Table, read_table
from fedloom.data.keys import KeyMap, rows_of
from fedloom.data.rows import Row
from fedloom.data.sources import HubSource, Source
from fedloom.home import data_home
from fedloom.seeds import numpy_generator
from fedloom.types import DataError

_ALPACA = KeyMap(prompt="instruction", completion="output", input="input")


class Named(Source):
    """A well-known set; a variant says where it lies, which columns it has, and how a record is refined."""

    path: Path | None = None
    """A copy of the set; default: the file below $FEDLOOM_DATA, then the hub."""

    keys: ClassVar[KeyMap] = _ALPACA
    stand_in: ClassVar[str] = ""
    """File below $FEDLOOM_DATA that stands in for the set, where there is one."""
    ways: ClassVar[str] = ""
    """How to get a set that is not on the hub."""

    def local(self) -> str:
        """Return the file below $FEDLOOM_DATA."""
        raise NotImplementedError

    def hub(self) -> HubSource | None:
        """Return the set on the hub, or None where it has no copy there."""
        return None

    def refine(self, record: Record) -> Record | None:
        """Map a record before its columns are read; None leaves it out."""
        return record

    def rows(self, seed: int) -> list[Row]:
        """Find and read the set; see `Source.rows`."""
        return rows_of(self._table(), self.keys, self.refine)

    def describe(self) -> str:
        """Say which copy is used; see `Source.describe`."""
        file = self._file()
        if file is None:
            hub = self.hub()
            return f"{self.part_name}: {hub.describe() if hub else 'no copy found'}"
        note = f" (a small stand-in for {self.part_name})" if self.path is None and self._is_stand_in(file) else ""
        return f"{self.part_name}: file {file}{note}"

    def _is_stand_in(self, file: Path) -> bool:
        return bool(self.stand_in) and file.match(self.stand_in)

    def _file(self) -> Path | None:
        if self.path is not None:
            return self.path.expanduser()
        home = data_home()
        names = [name for name in (self.local(), self.stand_in) if name] if home else []
        return next((home / name for name in names if home and (home / name).is_file()), None)

    def _table(self) -> Table:
        file, hub = self._file(), self.hub()
        if file is not None:
            return read_table(file)
        below = f"put the file at $FEDLOOM_DATA/{self.local()}, or name it with data.source.path=FILE"
        if hub is None:
            raise DataError(f"data.source={self.part_name}: no copy found\n  {below}\n  {self.ways}")
        try:
            return hub.table()
        except DataError as error:
            raise DataError(f"data.source={self.part_name}: {error}\n  - {below}") from error


class Gsm8k(Named, name="gsm8k"):
    """GSM8K, grade-school mathematics (arXiv 2110.14168): 7,473 training problems."""

    split: Literal["train", "test"] = "train"
    """Which of its two files."""
    marker: str = "#### "
    """Text before the final number; "The answer is " is what FS-LLM trains on."""
    calculator: bool = True
    """Whether the calculator's annotations, such as <<48/2=24>>, are kept."""

    keys: ClassVar[KeyMap] = KeyMap(prompt="question", completion="answer")

    def local(self) -> str:
        """Return the file of the chosen split."""
        return f"gsm8k/gsm8k_{self.split}.jsonl"

    def hub(self) -> HubSource:
        """Return the original on the hub."""
        return HubSource(id="openai/gsm8k", subset="main", split=self.split)

    def refine(self, record: Record) -> Record:
        """Apply the options to the answer."""
        answer = record.get("answer")
        if not isinstance(answer, str):
            return record  # the reader of the columns reports it, with its line
        kept = answer if self.calculator else re.sub(r"<<[^<>]*>>", "", answer)
        return {**record, "answer": kept.replace("#### ", self.marker)}


class Dolly(Named, name="dolly-15k"):
    """databricks-dolly-15k: 15,011 instructions of eight categories."""

    keys: ClassVar[KeyMap] = KeyMap(prompt="instruction", completion="response", input="context", category="category")

    def local(self) -> str:
        """Return the file with nine tenths of the set."""
        return "dolly/databricks-dolly-15k.train90.jsonl.gz"

    def hub(self) -> HubSource:
        """Return the original on the hub."""
        return HubSource(id="databricks/databricks-dolly-15k")


class Alpaca(Named, name="alpaca"):
    """Stanford Alpaca: 52,002 machine-written instructions."""

    stand_in: ClassVar[str] = "instruct/alpaca_en_demo.json"

    def local(self) -> str:
        """Return the file as its authors name it."""
        return "instruct/alpaca_data.json"

    def hub(self) -> HubSource:
        """Return the original on the hub."""
        return HubSource(id="tatsu-lab/alpaca")


class CodeAlpaca(Named, name="codealpaca"):
    """CodeAlpaca: 20,022 machine-written programming instructions."""

    def local(self) -> str:
        """Return the file as its authors name it."""
        return "code/code_alpaca_20k.json"

    def hub(self) -> HubSource:
        """Return the original on the hub."""
        return HubSource(id="sahil2801/CodeAlpaca-20k")


class FedCodeAlpaca(Named, name="fed-codealpaca"):
    """Rosetta-Alpaca, FS-LLM's Fed-CodeAlpaca: about 8,000 programming tasks; the category is the language."""

    drop: tuple[str, ...] = ("X86-64 Assembly",)
    """Languages left out: FS-LLM leaves out the one with too few rows for a client."""

    keys: ClassVar[KeyMap] = KeyMap(prompt="instruction", completion="output", input="input", category="language")
    ways: ClassVar[str] = (
        "no copy on the hub is known; download data/rosetta_alpaca.json of github.com/sahil280114/codealpaca"
        " (commit d269da106a579a623a654529b3cb91b5dfa9c72f)\n"
        "  a set of nine languages that can stand in for it: data.source=mbxp"
    )

    def local(self) -> str:
        """Return the file as its authors name it."""
        return "code/rosetta_alpaca.json"

    def refine(self, record: Record) -> Record | None:
        """Name the language, which the set keeps in `input`."""
        language = record.get("input")
        return None if language in self.drop else {**record, "language": language}


class Mbxp(Named, name="mbxp"):
    """MBXP (arXiv 2210.14868) with solutions in nine languages; the same tasks in each of them.

    Split by task (`data.splits.group: task`), else a task trained on in one language is tested in another.
    """

    above: NonNegativeInt = 510
    """Only tasks of a greater number: MBPP tests on 11 to 510."""

    keys: ClassVar[KeyMap] = KeyMap(
        prompt="description", completion="code", input="input", category="language", id="task_id"
    )
    ways: ClassVar[str] = "no copy on the hub is known; its parts are in github.com/amazon-science/mxeval, data/mbxp"

    def local(self) -> str:
        """Return the file with the solved tasks of all languages."""
        return "code/mbxp_9lang_solved.jsonl.gz"

    def refine(self, record: Record) -> Record | None:
        """Add the task's number, and join its code, which the set cuts after the signature."""
        number = re.search(r"\d+$", str(record.get("task_id")))
        if number is None or record.get("prompt") is None or record.get("canonical_solution") is None:
            return record  # the reader of the columns reports it, with its line
        if int(number[0]) <= self.above:
            return None
        code = f"{record['prompt']}{record['canonical_solution']}".strip("\n")
        kept = {key: record.get(key) for key in ("task_id", "description", "language")}
        return {**kept, "input": record.get("language"), "code": code, "task": number[0]}


class CodeSearchNet(Named, name="code-search-net"):
    """CodeSearchNet (arXiv 1909.09436): functions of six languages, to be written from their documentation."""

    share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the set that is drawn, by the seed; FS-LLM trains on 0.05."""

    keys: ClassVar[KeyMap] = KeyMap(prompt="docstring", completion="code", input="input", category="language")

    def local(self) -> str:
        """Return the file of all languages, one object a line with docstring, code and language."""
        return "code/code_search_net.jsonl.gz"

    def hub(self) -> HubSource:
        """Return the set on the hub."""
        return HubSource(id="code-search-net/code_search_net", subset="all")

    def refine(self, record: Record) -> Record:
        """Keep the three columns, which the hub names in another way."""
        named = {"docstring": "func_documentation_string", "code": "func_code_string", "language": "language"}
        kept = {key: record[key] if key in record else record.get(other) for key, other in named.items()}
        return {**kept, "input": kept["language"]}

    def rows(self, seed: int) -> list[Row]:
        """Draw the share; see `Source.rows`."""
        rows = super().rows(seed)
        if self.share == 1:
            return rows
        drawn = numpy_generator(seed, None, None, "share").permutation(len(rows))[
            : max(1, round(self.share * len(rows)))
        ]
        return [rows[i] for i in sorted(drawn.tolist())]


class PubMedQa(Named, name="pubmedqa"):
    """PubMedQA (arXiv 1909.06146): 1,000 questions on abstracts of papers, labelled by experts; half of them for tests.

    Which half a question belongs to is told by the authors' list of test ids, `test_ground_truth.json` beside the set.
    """

    split: Literal["train", "test"] = "train"
    """Which half."""
    answer: Literal["decision", "conclusion"] = "decision"
    """What is to be answered: yes, no or maybe, or the sentences with which the paper ends."""

    keys: ClassVar[KeyMap] = KeyMap(
        prompt="question", completion="answer", input="context", category="decision", id="pmid"
    )
    ways: ClassVar[str] = "ori_pqal.json and test_ground_truth.json are in github.com/pubmedqa/pubmedqa, data"

    def local(self) -> str:
        """Return the labelled questions."""
        return "pubmedqa/ori_pqal.json.gz"

    def refine(self, record: Record) -> Record:
        """Choose the answer, and join the context."""
        return {
            "pmid": record["pmid"],
            "question": record.get("QUESTION"),
            "context": "\n".join(record.get("CONTEXTS") or ()),
            "decision": record.get("final_decision"),
            "answer": record.get("final_decision" if self.answer == "decision" else "LONG_ANSWER"),
        }

    def _table(self) -> Table:
        file = self._file()
        if file is None:
            return super()._table()
        tests = file.with_name("test_ground_truth.json")
        held = _mapping(tests if tests.is_file() else tests.with_name(f"{tests.name}.gz"), "the list of test ids")
        questions = _mapping(file, "labelled questions")
        kept = [(pmid, one) for pmid, one in questions.items() if (pmid in held) == (self.split == "test")]
        return Table(
            str(file), "pubmedqa", "item", [(i, {"pmid": pmid, **one}) for i, (pmid, one) in enumerate(kept, 1)]
        )


def _mapping(file: Path, what: str) -> Mapping[str, Any]:
    """Read a JSON object, gzipped or not."""
    opened: Callable[..., Any] = gzip.open if file.suffix == ".gz" else open
    try:
        with opened(file, "rt", encoding="utf-8") as stream:
            tree = json.load(stream)
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"data.source=pubmedqa: {file}: {what} cannot be read ({error})") from error
    if not isinstance(tree, dict):
        raise DataError(f"data.source=pubmedqa: {file}: expected an object with PubMed ids as keys")
    return tree
