"""A caller's own request id: by every way in, to the server, and back with the result or the error."""

import asyncio
import json
from pathlib import Path

import pytest
from audioldm2_client import (
    AsyncAudioLDM2Client,
    AudioLDM2Client,
    DeadlineExceededError,
    InvalidRequestError,
    RequestCancelledError,
    ServerFaultError,
    ServerUnreachableError,
)
from audioldm2_client._cli.main import main
from audioldm2_client._errors import error_from_status
from audioldm2_client._request import build_request
from audioldm2_client._url import parse_urls

from tests.helpers.waiting import wait_until

ODD = ["x", "größe 犬", "a]b [request id: c] in ensemble 'd', ", "ü" * 64, "x" * 128, '"\\%s{}', "../../x"]
BAD = ["", "x" * 129, "ü" * 65, "a\nb", "a\0", "\x1b[31m", "\ud800", "a\u2028b", "\u200b"]


def id_that_arrived(error: InvalidRequestError) -> str:
    return json.loads(str(error).removeprefix("[INVALID_ARG] "))["id"]


@pytest.mark.parametrize("request_id", ODD)
def test_id_reaches_the_server_and_comes_back(client, request_id):
    assert client.generate("a dog", request_id=request_id).request_id == request_id
    generation = client.submit("a dog", request_id=request_id)
    assert (generation.id, generation.result().request_id) == (request_id, request_id)
    with pytest.raises(InvalidRequestError) as caught:
        client.generate("echo", request_id=request_id)
    assert (id_that_arrived(caught.value), caught.value.request_id) == (request_id, request_id)


def test_id_reaches_the_server_and_comes_back_under_asyncio(url):
    async def test() -> None:
        async with AsyncAudioLDM2Client(url) as client:
            assert (await client.generate("a dog", request_id="größe 1")).request_id == "größe 1"
            generation = client.submit("a dog", request_id="größe 2")
            assert (generation.id, (await generation.result()).request_id) == ("größe 2", "größe 2")
            with pytest.raises(InvalidRequestError) as caught:
                await client.generate("echo", request_id="größe 3")
            assert (id_that_arrived(caught.value), caught.value.request_id) == ("größe 3", "größe 3")

    asyncio.run(test())


def test_without_one_the_id_is_random(client):
    ids = {client.generate("a dog").request_id for _ in range(2)}
    assert len(ids) == 2
    assert all(len(request_id) == 32 for request_id in ids)


@pytest.mark.parametrize("request_id", BAD)
def test_bad_id_is_refused_before_anything_is_sent(request_id):
    with AudioLDM2Client("127.0.0.1:1") as client:
        with pytest.raises(InvalidRequestError, match="request_id must be printable text of 1 to 128 bytes in UTF-8"):
            client.submit("a dog", request_id=request_id)
        with pytest.raises(TypeError, match="request_id must be a str; got int"):
            client.submit("a dog", request_id=7)


def test_others_watch_and_cancel_by_it(url, ask, tmp_path):
    request_id = f"größe {tmp_path}"[-60:]
    with AudioLDM2Client(url) as client:
        generation = client.submit("a dog", num_inference_steps=1000, request_id=request_id)
        wait_until(lambda: ask(request_id).state == "denoising", 20, "denoising begins")
        generation.cancel()
        with pytest.raises(RequestCancelledError, match=request_id):
            generation.result()


def test_errors_of_the_client_name_it(client, waiting):
    with pytest.raises(ServerFaultError, match="failed on request my-id") as fault:
        client.generate("fail INTERNAL boom", request_id="my-id")
    with pytest.raises(DeadlineExceededError, match=r"\(request my-id\)") as deadline:
        client.generate(f"wait {waiting}", timeout_s=0.3, request_id="my-id")
    assert {fault.value.request_id, deadline.value.request_id} == {"my-id"}


def test_lost_connection_names_it():
    (address,) = parse_urls("localhost:8001")
    request = build_request("x", {}, model_name="audioldm2", request_id="my-id", timeout_s=1)
    error = error_from_status("StatusCode.UNAVAILABLE", "Socket closed", request, address)
    assert isinstance(error, ServerUnreachableError)
    assert str(error).endswith("(request my-id)")


@pytest.mark.parametrize("request_id", ["7", "a]b", "in ensemble 'x', ", "]"])
def test_prefix_with_the_id_is_not_part_of_the_servers_sentence(request_id):
    (address,) = parse_urls("localhost:8001")
    request = build_request("x", {}, model_name="audioldm2", request_id=request_id, timeout_s=1)
    raw = f"[request id: {request_id}] in ensemble 'audioldm2', [request id: {request_id}] [DEADLINE] over"
    error = error_from_status("StatusCode.CANCELLED", raw, request, address)
    assert isinstance(error, DeadlineExceededError)
    assert str(error) == "[DEADLINE] over"


def test_command_takes_it_and_prints_it(toy_server, tmp_path, capsys):
    arguments = ["-o", str(tmp_path / "x.wav"), "--url", toy_server.grpc_url, "--request-id", "größe"]
    assert main(["a dog", *arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["request_id"] == "größe"
    assert main(["echo", *arguments]) == 2
    assert '"id": "gr\\u00f6\\u00dfe"' in capsys.readouterr().err


def test_command_refuses_a_bad_one(tmp_path, capsys):
    assert main(["x", "-o", str(tmp_path / "x.wav"), "--url", "127.0.0.1:1", "--request-id", "a\tb"]) == 2
    assert capsys.readouterr().err.startswith("audioldm2: request_id must be printable text")


def run_batch(url: str, tmp_path: Path, *lines: dict) -> int:
    (tmp_path / "p.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return main(["--prompts", str(tmp_path / "p.jsonl"), "--output-dir", str(tmp_path / "out"), "--url", url, "--json"])


def test_batch_takes_it_from_its_lines_and_another_id_is_no_other_result(toy_server, tmp_path, capsys):
    lines = [{"prompt": "a dog", "request_id": "größe"}, {"prompt": "a cat"}]
    assert run_batch(toy_server.grpc_url, tmp_path, *lines) == 0
    ids = {record["prompt"]: record["request_id"] for record in map(json.loads, capsys.readouterr().out.splitlines())}
    assert ids["a dog"] == "größe"
    assert len(ids["a cat"]) == 32
    assert run_batch("127.0.0.1:1", tmp_path, {**lines[0], "request_id": "another"}, lines[1]) == 0  # nothing is sent


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ([{"prompt": "x", "request_id": ""}], "line 1: request_id must be printable text of 1 to 128 bytes"),
        ([{"prompt": "x", "request_id": 7}], "line 1: request_id must be a str; got int"),
        (
            [{"prompt": "x", "request_id": "a"}, {"prompt": "y"}, {"prompt": "z", "request_id": "a"}],
            "line 3: the request_id 'a' is also that of line 1",
        ),
    ],
)
def test_bad_id_in_a_batch_is_named_before_anything_is_sent(tmp_path, capsys, lines, sentence):
    assert run_batch("127.0.0.1:1", tmp_path, *lines) == 2
    assert sentence in capsys.readouterr().err


def test_one_id_for_all_prompts_of_a_batch_is_bad_usage(capsys):
    with pytest.raises(SystemExit):
        main(["--prompts", "p", "--output-dir", "d", "--request-id", "x"])
    assert "--request-id can't be used with --prompts" in capsys.readouterr().err
