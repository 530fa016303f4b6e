"""FedIT-U2S: what the model is shown, what passes, that pairs alone are trained on, and that texts stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.algorithms.by_hand import drive
from tests.bare import bare_server
from tests.helpers import adapter, lines, run, same, tree
from torch import Tensor

import fedloom
from fedloom import recipe as recipes
from fedloom.algorithms import Client
from fedloom.algorithms.fedit_u2s import Exemplar, FedItU2s, parsed, prompt
from fedloom.algorithms.pairs import packed, unpacked
from fedloom.checkpoint import MemoryStore
from fedloom.cost import Phase
from fedloom.runtime.effects import Performer
from fedloom.runtime.engine import Engine
from fedloom.types import (
    Bundle,
    ClientUpdate,
    Embed,
    Fit,
    Fitted,
    Generate,
    Message,
    Pair,
    RecipeError,
    ServerState,
    Texts,
)
from fedloom.wire import codec

PUBLIC = {"public": 6, "source": {"rows_per_category": 8}}
SHORT = {"name": "fedit-u2s", "max_new_tokens": 2}
SHOWN = [{"text": f"text {i}", "instruction": f"what is {i}", "answer": f"{i}"} for i in range(3)]
WEIGHTS = {"w": torch.zeros(2, dtype=torch.float64)}
ROWS = (Pair("", "north"), Pair("east?", "yes"))
PLACES = {
    "text 0": [1.0, 0.0],
    "text 1": [0.9, 0.1],
    "text 2": [0.0, 1.0],
    "north": [0.1, 1.0],
    "east?\nyes": [1.0, 0.2],
}


# what the model reads and writes


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (" Name it.\nAnswer: Blue", Pair("Name it.", "Blue")),
        (
            "Instruction: Name it.\n\nAnswer:  Blue \n\nText: another\nInstruction: x\nAnswer: y",
            Pair("Name it.", "Blue"),
        ),
        ("Name\nboth.\nAnswer: Blue\nand red.", Pair("Name\nboth.", "Blue\nand red.")),
        ("Name it.\nAnswer: Blue\nInstruction: again", Pair("Name it.", "Blue")),
        ("Name it.", None),
        ("Name it. Answer: Blue", None),
        ("\nAnswer: Blue", None),
        ("Name it.\nAnswer:  ", None),
        ("", None),
    ],
)
def test_what_is_parsed(output: str, expected: Pair | None) -> None:
    assert parsed(output) == expected


def test_what_passes() -> None:
    told = [
        "what is the colour of snow",
        "go",
        "what is the colour of the snow",
        "name two rivers",
        "What is the COLOUR of snow?",
    ]
    outputs = [f"{one}\nAnswer: white" for one in told]
    assert [pair.question for pair in FedItU2s().passed(outputs)] == [told[0], told[3]]
    assert [pair.question for pair in FedItU2s(min_words=1).passed(outputs)] == [told[0], told[1], told[3]]
    assert len(FedItU2s(overlap=1.0).passed(outputs)) == 3


def test_the_prompt_ends_where_the_instruction_begins() -> None:
    shown = [Exemplar(text="Snow is white.", instruction="Colour?", answer="white")]
    told = prompt("Grass is green.", shown)
    assert told.endswith(
        "\n\nText: Snow is white.\nInstruction: Colour?\nAnswer: white\n\nText: Grass is green.\nInstruction:"
    )


class Hands:
    """Answers a client's effects from given places of texts and given outputs, and notes what it is asked."""

    def __init__(self, outputs: list[str]) -> None:
        self.outputs, self.prompts, self.fits = outputs, [], []

    def __call__(self, effect: Any) -> Any:
        match effect:
            case Texts():
                return ROWS
            case Embed():
                return torch.tensor([PLACES[one] for one in effect.prompts])
            case Generate():
                assert effect.params is None
                assert effect.questions
                self.prompts += list(effect.prompts)
                return self.outputs
            case Fit():
                self.fits.append(effect)
                steps = 1 if len(effect.rows) else 0
                params = {name: t + steps for name, t in effect.start.items()}
                return Fitted(params, steps, 0.1, len(effect.rows), 0, (1.0,) * steps)
        raise AssertionError(effect)


def _client(memory: dict[str, Bundle] | None = None) -> Client:
    return Client("a", 0, memory or {}, 2, 2.0, WEIGHTS, lambda round_: WEIGHTS)


def _algorithm(**knobs: Any) -> FedItU2s:
    return FedItU2s(exemplars=SHOWN, **knobs)


def test_the_nearest_exemplars_are_shown_the_nearest_last() -> None:
    hands = Hands(["a b\nAnswer: c", "d e\nAnswer: f"])
    assert drive(_algorithm(shots=2).written(_algorithm().exemplars), hands) == (Pair("a b", "c"), Pair("d e", "f"))
    shown = [[i for i in range(3) if f"text {i}" in one] for one in hands.prompts]
    assert shown == [[1, 2], [0, 1]]
    assert hands.prompts[0].index("text 2") > hands.prompts[0].index("text 1")
    assert hands.prompts[0].endswith("Text: north\nInstruction:")


def test_pairs_alone_are_trained_on_and_written_once() -> None:
    hands = Hands(["a b\nAnswer: c", "no form"])
    message = Message({"params": Bundle(WEIGHTS)})
    update, memory = drive(_algorithm().train(_client(), message), hands)
    (fit,) = hands.fits
    assert fit.pairs == (Pair("a b", "c"),)
    assert fit.rows.tolist() == [2]  # behind the client's two rows
    assert update.weight == 1.0
    assert update.metrics["pairs"] == 1.0
    assert unpacked(memory["pairs"]) == fit.pairs
    again, kept = drive(_algorithm().train(_client(memory), message), hands)
    assert len(hands.prompts) == 2
    assert kept is memory
    assert hands.fits[1].pairs == fit.pairs
    assert not any(bundle.texts for one in (update, again) for bundle in one.message.groups.values())


def test_adaptation_takes_pairs_too() -> None:
    hands = Hands(["a b\nAnswer: c", "no form"])
    message = Message({"params": Bundle(WEIGHTS)})
    drive(_algorithm().adapt(_client(), message, 3), hands)
    (fit,) = hands.fits
    assert fit.rows.tolist() == [2]
    assert list(fit.steps) == [0, 1, 2]


def _update(name: str, weight: float, value: float) -> ClientUpdate:
    return ClientUpdate(name, weight, Message({"params": Bundle({"w": torch.full((2,), value).double()})}))


def test_clients_without_pairs_do_not_count() -> None:
    algorithm, server, state = _algorithm(), bare_server(("a", "b")), ServerState(0, WEIGHTS)
    mean: Tensor = (
        drive(algorithm.combine(server, state, [_update("a", 0, 0), _update("b", 3, 5)])).groups["params"].tensors["w"]
    )
    assert mean.tolist() == [5.0, 5.0]
    nobody = drive(algorithm.combine(server, state, [_update("a", 0, 0), _update("b", 0, 0)]))
    assert nobody.groups["params"].tensors["w"].tolist() == [0.0, 0.0]


# runs


@pytest.fixture
def writing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model cannot write: what it would say is given in its place."""

    def told(self: Performer, effect: Generate, client: str | None, round_: int) -> tuple[list[str], Phase, float]:
        prompts = enumerate(effect.prompts)
        texts = [f"say word{i} of {client} {len(p)}\nAnswer: private-{client}-{i}" for i, p in prompts]
        return texts, "generate", 0.0

    monkeypatch.setattr(Performer, "_generate", told)


@pytest.mark.usefixtures("writing")
def test_texts_and_pairs_stay_with_the_client(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    up: list[Message] = []
    down: list[Message] = []
    real = Engine.train

    def watched(self: Engine, round_: int, errands: Any, *more: Any) -> Any:
        down.extend(Message(codec.decode(one.message)) for one in errands)
        replies = real(self, round_, errands, *more)
        up.extend(Message(codec.decode(one.message)) for one in replies)
        return replies

    monkeypatch.setattr(Engine, "train", watched)
    result = run(tiny_folder, tmp_path / "r", data=PUBLIC, algorithm={**SHORT, "sent": 4})
    assert {tuple(message.groups) for message in up} == {("params",)}
    assert not any(bundle.texts for message in up for bundle in message.groups.values())
    exemplars = [message for message in down if "exemplars" in message.groups]
    assert len(exemplars) == 3  # the first message of each client
    assert {len(unpacked(message.groups["exemplars"])) for message in exemplars} == {4}
    assert all("private" not in str(message.groups) for message in down)
    kept = MemoryStore(result.folder / "memories")
    kept.restore(2)
    assert all("private-client-1" in pair.answer for pair in unpacked(kept.load("client-1")["pairs"]))
    told = [line["value"] for line in lines(result.folder / "metrics.jsonl") if line["name"] == "pairs"]
    assert len(told) == 6
    assert min(told) >= 1


@pytest.mark.usefixtures("writing")
def test_resumed_is_straight(tiny_folder: Path, tmp_path: Path) -> None:
    small = {"data": PUBLIC, "algorithm": SHORT, "sampler": {"count": 2}}
    straight = run(tiny_folder, tmp_path / "a", rounds=3, **small)
    run(tiny_folder, tmp_path / "b", rounds=1, **small)
    assert same(adapter(straight), adapter(fedloom.resume(tmp_path / "b", ["rounds=3"])))


def test_a_model_that_cannot_write_leaves_the_adapter_as_it_was(tiny_folder: Path, tmp_path: Path) -> None:
    short = run(tiny_folder, tmp_path / "a", algorithm={**SHORT, "exemplars": SHOWN}, rounds=2)
    shorter = run(tiny_folder, tmp_path / "b", algorithm={**SHORT, "exemplars": SHOWN}, rounds=1)
    assert same(adapter(short), adapter(shorter))
    told = [line["value"] for line in lines(short.folder / "metrics.jsonl") if line["name"] == "pairs"]
    assert set(told) == {0.0}


def test_exemplars_of_the_recipe_are_never_sent() -> None:
    algorithm, state = _algorithm(), ServerState(0, WEIGHTS)
    assert drive(algorithm.prepare(bare_server(("a",)), state)) is state
    assert set(algorithm.broadcast(bare_server(("a",)), state, "a").groups) == {"params"}
    public = drive(FedItU2s(sent=1).prepare(bare_server(("a",)), state), lambda effect: ROWS)
    assert public.slots["exemplars"] == packed(ROWS[:1])


# refusals


def test_no_exemplars_at_all(tmp_path: Path) -> None:
    message = (
        r"algorithm=fedit-u2s shows the model exemplars, and has none; set data\.public .* or algorithm\.exemplars"
    )
    with pytest.raises(RecipeError, match=message):
        recipes.load(tree(tmp_path, algorithm="fedit-u2s"))


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"exemplars": [{"text": "", "instruction": "a", "answer": "b"}]}, "at least 1 character"),
        ({"exemplars": [{"text": "x", "question": "a", "answer": "b"}]}, "no key 'question' here"),
        ({"overlap": 0}, "greater than 0"),
        ({"temperature": -1}, "greater than or equal to 0"),
        ({"shots": 0}, "greater than 0"),
    ],
)
def test_bad_settings(tmp_path: Path, knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipes.load(tree(tmp_path, data=PUBLIC, algorithm={"name": "fedit-u2s", **knobs}))
