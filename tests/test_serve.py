"""btx serve: the page, OpenAI's interface with routing besides, and what is refused."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="btx serve is an extra")
from starlette.testclient import TestClient

from btx.cli.serve import _served
from btx.errors import CheckpointError, UserError
from btx.serving import server
from btx.serving.completing import ShownToken, _begun, until_stop
from btx.serving.requests import CompletionRequest, Refused, read_request
from btx.serving.sampling import Sampling
from btx.serving.server import Speakers, begin, make_app, serve
from btx.serving.speaker import Speaker, prompt_ids, text_ids
from tests.pico_models import llama, mixtral

EXPERTS = ["math", "code", "wiki", "generalist"]
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|endoftext|>{% endfor %}assistant:"
ASKED = {"messages": [{"role": "user", "content": "the sum of"}], "max_tokens": 6, "temperature": 0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A mixture with a chat template, and a dense model without."""
    folder = tmp_path_factory.mktemp("served")
    paths = {"btx": mixtral(folder / "btx"), "seed": llama(folder / "seed")}
    (paths["btx"] / "chat_template.jinja").write_text(TEMPLATE)
    (paths["btx"] / "mix.json").write_text(json.dumps({"experts": EXPERTS}))
    return paths


@pytest.fixture(scope="module")
def client(folders: dict[str, Path]) -> Iterator[TestClient]:
    speakers = Speakers(folders, lambda line: None)
    with TestClient(
        make_app(speakers, ["127.0.0.1"]), base_url="http://127.0.0.1", raise_server_exceptions=False
    ) as it:
        yield it


def pieces(reply: Any) -> list[dict[str, Any]]:
    """What a stream held, its end left out."""
    lines = [line.removeprefix("data: ") for line in reply.text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_a_conversation_is_answered_with_the_experts_of_every_token(
    client: TestClient, folders: dict[str, Path]
) -> None:
    reply = client.post("/v1/chat/completions", json=ASKED).json()
    speaker = Speaker(folders["btx"])
    ids = prompt_ids(speaker.tokenizer, ASKED["messages"])  # type: ignore[arg-type]
    expected = list(speaker.answer(ids, Sampling(6)))
    (choice,) = reply["choices"]
    assert reply["object"] == "chat.completion"
    assert choice["message"] == {
        "role": "assistant", "content": "".join(token.text for token in expected if not token.from_prompt)
    }  # fmt: skip
    assert choice["finish_reason"] == "length"
    assert reply["usage"]["completion_tokens"] == 6
    routing = choice["routing"]
    assert routing["experts"] == EXPERTS
    assert "".join(token["text"] for token in routing["tokens"]) == "".join(token.text for token in expected)
    for shown in routing["tokens"]:
        if shown["pair"]:  # cut-off characters at the end have none
            assert len(shown["gates"]) == 2
            assert all(abs(sum(layer) - 1) < 0.01 for layer in shown["gates"])


def test_a_stream_holds_what_the_whole_reply_holds(client: TestClient) -> None:
    whole = client.post("/v1/chat/completions", json=ASKED).json()
    asked = ASKED | {"stream": True, "stream_options": {"include_usage": True}}
    streamed = pieces(client.post("/v1/chat/completions", json=asked))
    assert streamed[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert streamed.pop()["usage"] == whole["usage"]
    choices = [piece["choices"][0] for piece in streamed]
    text = "".join(choice["delta"].get("content", "") for choice in choices)
    assert text == whole["choices"][0]["message"]["content"]
    assert choices[-1]["finish_reason"] == "length"
    tokens = [token for choice in choices for token in choice.get("routing", {"tokens": []})["tokens"]]
    assert tokens == whole["choices"][0]["routing"]["tokens"]


def test_a_text_is_completed_without_the_template(client: TestClient, folders: dict[str, Path]) -> None:
    asked = {"prompt": "the sum of", "max_tokens": 4, "temperature": 0, "routing": False}
    reply = client.post("/v1/completions", json=asked).json()
    assert reply["object"] == "text_completion"
    assert "routing" not in reply["choices"][0]
    speaker = Speaker(folders["btx"])
    answer = speaker.answer(text_ids(speaker.tokenizer, "the sum of"), Sampling(4))
    expected = "".join(token.text for token in answer if not token.from_prompt)
    assert reply["choices"][0]["text"] == expected
    streamed = pieces(client.post("/v1/completions", json=asked | {"stream": True}))
    assert "".join(piece["choices"][0]["text"] for piece in streamed) == expected


def test_experts_can_be_chosen_and_models_are_told_apart(client: TestClient) -> None:
    chosen = client.post("/v1/chat/completions", json=ASKED | {"experts": {"only": ["code"]}}).json()
    used = {tuple(token["pair"]) for token in chosen["choices"][0]["routing"]["tokens"]}
    assert used - {()} == {(1,)}
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["btx", "seed"]
    assert client.get("/model").json()["experts"] == EXPERTS
    assert client.get("/model", params={"model": "seed"}).json() == {
        "model": "seed", "experts": [], "has_template": False, "longest": 256
    }  # fmt: skip
    dense = client.post("/v1/chat/completions", json=ASKED | {"model": "seed"}).json()
    assert dense["model"] == "seed"
    assert all(token["pair"] == [] for token in dense["choices"][0]["routing"]["tokens"])


def test_openais_own_client_understands_answers_and_refusals(client: TestClient) -> None:
    openai = pytest.importorskip("openai", reason="pip install openai")
    theirs = openai.OpenAI(base_url="http://127.0.0.1/v1", api_key="none", max_retries=0, http_client=client)
    assert [model.id for model in theirs.models.list()] == ["btx", "seed"]
    whole = theirs.chat.completions.create(model="btx", extra_body={"experts": {"only": ["code"]}}, **ASKED)
    assert {tuple(token["pair"]) for token in whole.choices[0].routing["tokens"]} - {()} == {(1,)}
    streamed = list(theirs.completions.create(model="btx", prompt="the sum", max_tokens=4, temperature=0, stream=True))
    assert streamed[-1].choices[0].finish_reason == "length"
    text = theirs.completions.create(model="btx", prompt="the sum", max_tokens=4, temperature=0).choices[0].text
    assert "".join(piece.choices[0].text for piece in streamed) == text
    with pytest.raises(openai.NotFoundError, match="no model 'law' here") as refused:
        theirs.chat.completions.create(model="law", **ASKED)
    assert refused.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="one answer a request") as refused:
        theirs.chat.completions.create(model="btx", n=2, **ASKED)
    assert refused.value.param == "n"


def test_a_stop_string_ends_an_answer_and_is_not_shown(client: TestClient) -> None:
    text = client.post("/v1/chat/completions", json=ASKED).json()["choices"][0]["message"]["content"]
    stop = text[2:4]
    reply = client.post("/v1/chat/completions", json=ASKED | {"stop": stop}).json()["choices"][0]
    assert reply["message"]["content"] == text[: text.index(stop)]
    assert reply["finish_reason"] == "stop"


@pytest.mark.parametrize("stops", [("aab",), ("ab", "ba"), ("a" * 1_000_000 + "b",), ("b" * 1_000_000, "aba")])
def test_tokens_are_held_back_as_long_as_a_stop_string_may_come(stops: tuple[str, ...]) -> None:
    text = "abaabaab"
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    tokens = [ShownToken(sign, (), from_prompt=False) for sign in text]
    assert "".join(token.text for token in until_stop(iter(tokens), stops)) == text[: min(places, default=len(text))]
    for stop, end in product(("a", "ab", "aab", "abab", "b" * 9), range(len(text) + 1)):
        slow = [n for n in range(1, len(stop)) if text[:end].endswith(stop[:n])]
        assert _begun(stop, text[:end]) == max(slow, default=0)


@pytest.mark.parametrize(("change", "message"), [
    ({"temperature": -1}, "temperature: "), ({"messages": []}, "messages: "), ({"max_tokens": "many"}, "max_tokens: "),
    ({"n": 2}, "n: one answer a request"), ({"logit_bias": {"5": 1}}, "logit_bias: tokens have no bias"),
    ({"response_format": {"type": "json_object"}}, "answers are text"),
    ({"experts": {"only": ["law"]}}, "no expert 'law'; the model's are: math, code, wiki, generalist"),
    ({"experts": {"forbid": ["math"]}}, "experts.forbid: "), ({"tools": [{}]}, "tools: "),
    ({"logprobs": True}, "logprobs"), ({"stop": [""]}, "stop: 16 texts at most, none of them empty"),
    ({"stop": ["a"] * 17}, "stop: 16 texts at most"),
    ({"messages": [{"role": "user", "content": "three and " * 300}]}, "the model reads|reads 256 at most; shorten it"),
    ({"messages": [{"role": "user"}]}, "content"), ({"model": "seed", "experts": {"without": ["math"]}}, "dense model"),
])  # fmt: skip
def test_what_cannot_be_answered_is_refused_in_a_sentence(client: TestClient, change: Any, message: str) -> None:
    reply = client.post("/v1/chat/completions", json=ASKED | change)
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error.keys() == {"message", "type", "param", "code"}
    assert any(part in error["message"] for part in message.split("|"))


def test_what_is_not_there_is_not_found_as_openai_says_it(client: TestClient) -> None:
    assert client.get("/v1/models/seed").json()["id"] == "seed"
    for reply in (client.get("/v1/models/law"), client.post("/v1/chat/completions", json=ASKED | {"model": "law"})):
        assert reply.status_code == 404
        error = reply.json()["error"]
        assert (error["param"], error["code"]) == ("model", "model_not_found")
        assert "no model 'law' here; there are: btx, seed" in error["message"]
    for reply, status in ((client.post("/v1/embeddings", json={}), 404), (client.get("/v1/completions"), 405)):
        assert reply.status_code == status
        assert "there is /v1/models, /v1/chat/completions" in reply.json()["error"]["message"]


@pytest.mark.parametrize(("headers", "status"), [
    ({}, 200), ({"origin": "http://127.0.0.1"}, 200), ({"sec-fetch-site": "same-origin"}, 200),
    ({"origin": "http://evil.example"}, 403), ({"origin": "null"}, 403), ({"origin": "http://127.0.0.1:8080"}, 403),
    ({"sec-fetch-site": "cross-site"}, 403), ({"sec-fetch-site": "same-site"}, 403), ({"host": "evil.example"}, 400),
])  # fmt: skip
def test_pages_of_other_origins_and_names_are_not_answered(client: TestClient, headers: Any, status: int) -> None:
    asked = ASKED | {"max_tokens": 0}
    assert client.post("/v1/chat/completions", json=asked, headers=headers).status_code == status
    assert client.get("/v1/models", headers=headers).status_code == status
    assert client.get("/", headers=headers).status_code == (200 if "sec-fetch-site" in headers else status)


def test_without_a_seed_answers_differ_and_with_one_they_do_not(client: TestClient) -> None:
    def answers(**seed: int) -> set[str]:
        asked = ASKED | {"temperature": 2.0, "max_tokens": 12} | seed
        return {str(client.post("/v1/chat/completions", json=asked).json()["choices"]) for _ in range(3)}

    assert len(answers()) > 1
    assert len(answers(seed=1)) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_is_given_up_when_nobody_reads_it_or_the_server_ends(folders: dict[str, Path], stream: bool) -> None:
    asked = read_request(CompletionRequest, json.dumps({"prompt": "the", "stream": stream, "temperature": 0}).encode())
    for end in ("left", "closing"):
        speakers = Speakers(folders, lambda line: None)
        reply = begin(speakers, asked)
        speakers.closing.set() if end == "closing" else setattr(reply, "is_left", True)
        with pytest.raises(Refused, match="given up"):
            list(reply.stream()) if stream else reply.whole()
        assert reply.answer.new_tokens == 0


def test_what_is_no_json_is_refused_and_so_is_another_host(client: TestClient) -> None:
    assert client.post("/v1/completions", content=b"{", headers={"content-type": "application/json"}).status_code == 400
    form = client.post("/v1/completions", content=b"{}", headers={"content-type": "text/plain"})
    assert "content-type: application/json" in form.json()["error"]["message"]
    large = client.post("/v1/completions", json={"prompt": "x" * server.LARGEST_REQUEST})
    assert "bytes" in large.json()["error"]["message"]
    assert client.get("/", headers={"host": "evil.example"}).status_code == 400
    assert client.get("/nothing").status_code == 404


def test_the_page_loads_nothing_from_elsewhere(client: TestClient) -> None:
    page = client.get("/")
    assert page.headers["content-security-policy"] == server.POLICY
    for file in server.FILES:
        text = client.get(f"/{'' if file == 'index.html' else file}").text
        assert "http" not in text.replace("http-equiv", ""), file
        assert "innerHTML" not in text
        assert " style=" not in text
        assert " onclick=" not in text


def test_two_users_at_once_get_the_answers_that_each_would_get_alone(client: TestClient) -> None:
    asked = [ASKED | {"experts": {"only": [name]}, "max_tokens": 12} for name in EXPERTS]
    alone = [client.post("/v1/chat/completions", json=each).json()["choices"] for each in asked]
    together: dict[int, Any] = {}

    def ask(number: int) -> None:
        together[number] = client.post("/v1/chat/completions", json=asked[number]).json()["choices"]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[number] for number in range(len(asked))] == alone


def test_what_fails_in_the_middle_ends_the_stream_with_the_reason(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: object) -> Any:
        raise RuntimeError("no more memory")
        yield

    monkeypatch.setattr("btx.serving.speaker.Answer._counted", fails)
    reply = client.post("/v1/chat/completions", json=ASKED | {"stream": True})
    last = json.loads(reply.text.strip().split("\n\n")[-1].removeprefix("data: "))
    assert "no more memory" in last["error"]["message"]


def test_what_fails_otherwise_is_told_as_openai_does(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: object) -> Any:
        raise RuntimeError("no more memory")

    monkeypatch.setattr("btx.serving.speaker.Answer._counted", fails)
    reply = client.post("/v1/chat/completions", json=ASKED)
    assert reply.status_code == 500
    assert reply.json()["error"]["type"] == "server_error"
    assert "no more memory" in reply.json()["error"]["message"]


def test_what_is_no_model_is_refused_before_anything_listens(tmp_path: Path, folders: dict[str, Path]) -> None:
    with pytest.raises(CheckpointError, match="nothing"):
        _served(tmp_path / "nothing")
    assert _served(folders["seed"]) == {"seed": folders["seed"]}
    with pytest.raises(UserError, match=r"203\.0\.113\.1:80 cannot be listened on"):
        serve(folders, host="203.0.113.1", port=80, log=lambda line: None)
