"""Short Python snippets whose printed output is asked for."""

from __future__ import annotations

from random import Random

from fedloom.data.tasks.phrasing import Draw, Pair, mixed, phrase
from fedloom.data.tasks.words import COLOURS, GROUPS, NAMES, NOUNS

_ASK = (
    "What does this Python code print?\n{code}",
    "Give the output of this Python program.\n{code}",
    "{name} runs this Python code. What is printed?\n{code}",
    "{code}\nWhat does this Python snippet print?",
    "{code}\nWrite the output of this Python code.",
    "Run this Python code in your head and write what it prints.\n{code}",
    "Predict the output of the Python code below.\n{code}",
    "What appears on the screen when Python runs this?\n{code}",
)
_NUMBER_NAMES = ("a", "b", "n", "x", "y", "total", "count")
_TEXT_NAMES = ("s", "word", "text", "name", "label")
_LIST_NAMES = ("items", "values", "data", "row", "things")


def code_output(rng: Random) -> Pair:
    """Draw a Python snippet of one to four lines and its printed output.

    Args:
        rng: source of the wording and of the snippet.

    Returns:
        Prompt and answer: the single printed line.
    """
    code, printed = mixed(rng, _KINDS)
    return phrase(rng, _ASK, code=code, name=rng.choice(NAMES)), printed


def _expression(rng: Random) -> Pair:
    """Print the sum of two variables."""
    x, y = rng.sample(_NUMBER_NAMES, 2)
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    return f"{x} = {a}\n{y} = {b}\nprint({x} + {y})", str(a + b)


def _method(rng: Random) -> Pair:
    """Print a word after a string method."""
    s, word = rng.choice(_TEXT_NAMES), rng.choice(NOUNS)
    method, value = rng.choice((("upper", word.upper()), ("capitalize", word.capitalize()), ("title", word.title())))
    return f'{s} = "{word}"\nprint({s}.{method}())', value


def _joined(rng: Random) -> Pair:
    """Print two words joined by plus or by join."""
    one, two = rng.sample(NOUNS, 2)
    mark = rng.choice(("-", " "))
    code = rng.choice((f'print("{mark}".join(["{one}", "{two}"]))', f'print("{one}" + "{mark}" + "{two}")'))
    return code, f"{one}{mark}{two}"


def _printed(rng: Random) -> Pair:
    """Print a word and a number as two arguments."""
    x, number, word = rng.choice(_NUMBER_NAMES), rng.randint(2, 99), rng.choice(NOUNS)
    code, printed = rng.choice(((f'"{word}", {x}', f"{word} {number}"), (f'{x}, "{word}"', f"{number} {word}")))
    return f"{x} = {number}\nprint({code})", printed


def _indexed(rng: Random) -> Pair:
    """Print one element of a list of words."""
    name, pool = rng.choice(_LIST_NAMES), rng.choice((COLOURS, NOUNS, GROUPS["fruits"]))
    words = rng.sample(pool, rng.randint(2, 3))
    index = rng.choice((0, 1))
    quoted = ", ".join(f'"{word}"' for word in words)
    return f"{name} = [{quoted}]\nprint({name}[{index}])", words[index]


def _appended(rng: Random) -> Pair:
    """Print a list of numbers after one more was appended."""
    name, numbers = rng.choice(_LIST_NAMES), rng.sample(range(1, 10), rng.randint(2, 3))
    extra = rng.randint(1, 9)
    return f"{name} = {numbers}\n{name}.append({extra})\nprint({name})", str([*numbers, extra])


def _formatted(rng: Random) -> Pair:
    """Print a formatted text."""
    word, number = rng.choice(NOUNS), rng.randint(2, 99)
    mark = rng.choice((" ", ": ", "-"))
    key, x = rng.choice(_TEXT_NAMES), rng.choice(_NUMBER_NAMES)
    return f'{key} = "{word}"\n{x} = {number}\nprint(f"{{{key}}}{mark}{{{x}}}")', f"{word}{mark}{number}"


_KINDS: tuple[Draw, ...] = (_expression, _method, _joined, _printed, _indexed, _appended, _formatted)
