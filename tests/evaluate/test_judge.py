from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from tests.evaluate.bare_view import BareView
from tests.tiny import tiny_model, tiny_tokenizer

from fedloom import recipe as recipes
from fedloom.evaluate import Evaluation
from fedloom.evaluate.judge import Judge
from fedloom.evaluate.view import interval, spread
from fedloom.results import measures
from fedloom.types import DataError, RecipeError

Reply = Callable[[int, dict[str, Any]], tuple[int, str | bytes]]


@contextmanager
def endpoint(reply: Reply, seconds: float = 0.0) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Serve an OpenAI-compatible endpoint; `reply` maps a request's number and body to a status and a text,
    or to the bytes of the whole answer."""
    seen: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append({**body, "path": self.path, "key": self.headers.get("Authorization")})
            status, text = reply(len(seen) - 1, body)
            time.sleep(seconds)
            if isinstance(text, bytes):
                self.wfile.write(text)
                self.close_connection = True
                return
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps({"choices": [{"message": {"content": text}}]}).encode())

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", seen
    finally:
        server.shutdown()
        server.server_close()


def judge(folder: Path, url: str, count: int = 3, **knobs: Any) -> Judge:
    rows = [
        {"question_id": i, "category": "ab"[i % 2], "turns": [f"Question {i}?", "Why?"][: 1 + i % 2]}
        for i in range(count)
    ]
    rows[0]["reference"] = ["It is so."]
    file = folder / "questions.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    given = {"wait": 0.01, "max_new_tokens": 4, "timeout": 5, **knobs}
    return Judge(url=url, model="big", path=file, limit=None, **given)


def view() -> BareView:
    return BareView(tiny_model(), tiny_tokenizer())


def test_ratings_by_category(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "canary")
    with endpoint(lambda i, body: (200, f"Not [[1]] but [[{i + 4}]].")) as (url, seen):
        found = judge(tmp_path, url).evaluate(view())
    assert found.metrics == {"rating": 5.0, "rated": 3.0, "rating/a": 5.0, "rating/b": 5.0}
    assert found.not_run == ""
    assert [one.score for _, one in found.samples] == [4.0, 5.0, 6.0]
    assert {(one["path"], one["model"], one["key"]) for one in seen} == {
        ("/v1/chat/completions", "big", "Bearer canary")
    }
    texts = [one["messages"][0]["content"] for one in seen]
    assert "[answers of reference]\nIt is so." in texts[0]
    assert texts[1].count("[user]") == texts[1].count("[assistant]") == 2  # both turns, each answered
    assert "canary" not in json.dumps([one.prompt for _, one in found.samples])


def test_errors_of_the_server_are_retried(tmp_path: Path) -> None:
    with endpoint(lambda i, body: (500, "") if i in (0, 1) else (200, "[[7]]")) as (url, seen):
        found = judge(tmp_path, url).evaluate(view())
    assert (found.metrics["rating"], found.metrics["rated"], found.not_run) == (7.0, 3.0, "")
    assert len(seen) == 5


def test_what_was_rated_is_kept_when_the_endpoint_fails(tmp_path: Path) -> None:
    with endpoint(lambda i, body: (200, "[[7]]") if i == 0 else (500, "")) as (url, seen):
        found = judge(tmp_path, url, retries=2).evaluate(view())
    assert (found.metrics["rating"], found.metrics["rated"]) == (7.0, 1.0)
    assert found.not_run.startswith("2 of 3 ratings could not be had; question 1: http")
    assert "answers 500 Internal Server Error, 3 times" in found.not_run
    assert [one.score for _, one in found.samples] == [7.0, None, None]
    assert all(one.output is not None for _, one in found.samples)
    assert len(seen) == 1 + 2 * 3


CUT_SHORT = b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n{"
NO_STATUS = b"hello?\r\n\r\n"


@pytest.mark.parametrize(
    ("answer", "named"), [(CUT_SHORT, "gives no answer (IncompleteRead"), (NO_STATUS, "gives no answer (BadStatusLine")]
)
def test_answers_that_are_no_http_cost_only_themselves(tmp_path: Path, answer: bytes, named: str) -> None:
    with endpoint(lambda i, body: (200, "[[7]]") if i == 0 else (200, answer)) as (url, seen):
        found = judge(tmp_path, url, retries=1).evaluate(view())
    assert (found.metrics["rating"], found.metrics["rated"]) == (7.0, 1.0)
    assert found.not_run.startswith("2 of 3 ratings could not be had; question 1: http")
    assert named in found.not_run
    assert [one.score for _, one in found.samples] == [7.0, None, None]
    assert len(seen) == 1 + 2 * 2


def test_the_rating_leads_and_clients_may_lack_a_category(tmp_path: Path) -> None:
    assert measures("judge", {"rated": 3.0, "rating": 5.0})[0].metric == "rating"
    told = spread(Judge(url="http://x", model="m"), {"ann": {"rating": 4.0}, "bob": {"rating": 8.0, "rating/a": 8.0}})
    assert told["rating_worst10"] == 4.0 and told["rating/a_worst10"] == 8.0
    assert interval(Judge(url="http://x", model="m"), Evaluation({}, {"ann": {}, "bob": {"rating": 8.0}})) == {}


def test_silence_is_a_failure(tmp_path: Path) -> None:
    with endpoint(lambda i, body: (200, "[[7]]"), seconds=0.5) as (url, _):
        found = judge(tmp_path, url, count=1, retries=1, timeout=0.1).evaluate(view())
    assert found.metrics == {}
    assert "gives no answer (TimeoutError" in found.not_run


def test_nobody_there_is_not_asked_for_ever(tmp_path: Path) -> None:
    found = judge(tmp_path, "http://127.0.0.1:9/v1", count=6, retries=0).evaluate(view())
    assert found.metrics == {}
    assert found.not_run.startswith("6 of 6 ratings could not be had")
    assert [one.verdict for _, one in found.samples].count("not asked after three failures") == 3


def test_a_wrong_key_is_not_retried(tmp_path: Path) -> None:
    with endpoint(lambda i, body: (401, "")) as (url, seen):
        found = judge(tmp_path, url, count=1).evaluate(view())
    assert len(seen) == 1
    assert "answers 401 Unauthorized; look at url, model and $OPENAI_API_KEY" in found.not_run


def test_no_rating_in_the_words(tmp_path: Path) -> None:
    with endpoint(lambda i, body: (200, "Fine! [[11]]")) as (url, _):
        found = judge(tmp_path, url, count=1, retries=0).evaluate(view())
    assert "the judge gave no rating from 1 to 10: 'Fine! [[11]]'" in found.not_run


def test_bad_questions_and_settings(tmp_path: Path) -> None:
    part = judge(tmp_path, "http://localhost/v1")
    (tmp_path / "questions.jsonl").write_text('{"question_id": 4, "turns": "why?"}')
    with pytest.raises(DataError, match="question 4: turns is no list of texts"):
        part.evaluate(view())
    with pytest.raises(RecipeError, match="url"):
        recipes.load({"evaluate": ["judge"]})


def test_off_by_default() -> None:
    assert "judge" not in [one.part_name for one in recipes.load({}).evaluate]
    assert not any("judge" in text for text in recipes.shipped().values())
