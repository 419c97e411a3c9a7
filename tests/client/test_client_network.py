"""The network between client and server: proxies, connections that die in silence, wrong ports, gevent."""

import asyncio
import socket
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
from audioldm2_client import (
    AsyncAudioLDM2Client,
    AudioLDM2Client,
    DeadlineExceededError,
    Progress,
    ServerUnreachableError,
    _async_transport,
    _network,
    _transport,
)
from audioldm2_client._cli.main import main
from audioldm2_client._proxy import find_proxy
from audioldm2_client._silence import LOOKS_WITHOUT_A_SIGN, Silence

from server import EmbeddedServer
from tests.helpers.gateways import Answering, Proxy, Relay
from tests.helpers.waiting import wait_until

DEAD = "http://127.0.0.1:9"
VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "grpc_proxy", "no_grpc_proxy")


@pytest.fixture(autouse=True)
def environment(monkeypatch) -> pytest.MonkeyPatch:
    """Without the proxies of whatever machine this runs on."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return monkeypatch


def generate(url: str, **settings) -> None:
    """Generate with both clients."""

    async def generate_asyncio() -> None:
        async with AsyncAudioLDM2Client(url, **settings) as client:
            await client.generate("a dog")

    with AudioLDM2Client(url, **settings) as client:
        client.generate("a dog")
    asyncio.run(generate_asyncio())


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "all_proxy", "https_proxy", "grpc_proxy"])
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_proxy_of_the_environment_never_gets_what_is_for_this_machine(url, environment, variable, host):
    environment.setenv(variable, DEAD)
    generate(url.replace("127.0.0.1", host), max_retries=0)


def test_other_hosts_are_reached_through_the_proxy(toy_server, protocol, environment):
    target = toy_server.grpc_url if protocol == "grpc" else toy_server.http_url
    with Proxy(target) as proxy:
        environment.setenv("http_proxy", f"http://127.0.0.1:{proxy.port}")
        generate(f"{protocol}://server.invalid:8765")
        assert len(proxy.asked) >= 2
        assert all("server.invalid:8765" in line for line in proxy.asked)
        environment.setenv("no_proxy", ".invalid")
        with pytest.raises(ServerUnreachableError) as caught:
            generate(f"{protocol}://server.invalid:8765", max_retries=0)
        assert "proxy" not in str(caught.value)


def test_proxy_that_fails_is_named_with_its_variable_and_without_its_password(protocol, environment):
    environment.setenv("HTTP_PROXY", "http://user:s3cret@127.0.0.1:9")
    with pytest.raises(ServerUnreachableError) as caught:
        generate(f"{protocol}://server.invalid:8765", max_retries=0)
    assert "through the proxy http://...@127.0.0.1:9 of the variable HTTP_PROXY" in str(caught.value)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("scheme", ["grpc", "https"])
def test_refusal_of_a_proxy_names_its_status_and_the_variable(environment, scheme):
    with Answering(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n") as proxy:
        environment.setenv("all_proxy", f"127.0.0.1:{proxy.port}")
        with pytest.raises(Exception, match=r"407 Proxy Authentication Required.* of the variable all_proxy") as caught:
            generate(f"{scheme}://server.invalid:8765", max_retries=0)
    assert type(caught.value).__name__ == "AccessDeniedError"


@pytest.mark.parametrize("value", ["socks5://127.0.0.1:1080", "https://127.0.0.1:1", "http://:3128", "http://a:b"])
def test_proxy_that_cannot_be_used_is_told_when_the_client_is_made(environment, value, protocol):
    environment.setenv("all_proxy", value)
    AudioLDM2Client(f"{protocol}://localhost:1").close()
    with pytest.raises(ValueError, match=r"all_proxy must name a proxy as http://host:port"):
        AudioLDM2Client(f"{protocol}://server.invalid:1")


@pytest.mark.parametrize(
    ("host", "no_proxy", "proxied"),
    [
        ("a.example", "", True),
        ("a.example", "*", False),
        ("a.example", "b.example, example", False),
        ("a.example", ".example", False),
        ("a.example", "*.example", False),
        ("a.example", "A.EXAMPLE", False),
        ("a.example.", "a.example", False),
        ("ba.example", "a.example", True),
        ("a.example", "a.example:81", True),
        ("a.example", "a.example:80", False),
        ("10.1.2.3", "10.0.0.0/8", False),
        ("11.1.2.3", "10.0.0.0/8,x/y", True),
        ("10.1.2.3", "2.3", True),
        ("fd00::1", "fd00::/8", False),
        ("fd00::1", "[fd00::1]", False),
        ("127.9.9.9", "", False),
        ("::1", "", False),
        ("::ffff:127.0.0.1", "", False),
        ("0.0.0.0", "", False),  # noqa: S104 - a destination
        ("LOCALHOST", "", False),
        ("x.localhost.", "", False),
        ("localhost.example", "", True),
    ],
)
def test_exceptions_are_domains_addresses_networks_and_this_machine(host, no_proxy, proxied):
    environment = {"http_proxy": "http://proxy:3128", "no_proxy": no_proxy}
    assert (find_proxy(host, 80, secure=False, environment=environment) is not None) == proxied


def test_each_scheme_has_its_variable_and_all_proxy_is_for_both():
    both = {"HTTP_PROXY": "http://plain", "https_proxy": "tls:1", "all_proxy": "http://all:2", "ALL_PROXY": "x"}
    for secure, url, variable in ((False, "http://plain:80", "HTTP_PROXY"), (True, "http://tls:1", "https_proxy")):
        found = find_proxy("a.example", 80, secure=secure, environment=both)
        assert (found.url, found.variable) == (url, variable)
    assert find_proxy("a.example", 80, secure=True, environment={"all_proxy": "http://all:2"}).url == "http://all:2"
    assert find_proxy("a.example", 80, secure=True, environment={"http_proxy": "http://plain:1"}) is None


@pytest.mark.parametrize(
    ("scheme", "port_of", "advice"),
    [
        ("grpc", "http", "this port speaks HTTP without TLS, not gRPC without TLS; check that the URL is http://{}"),
        ("http", "grpc", "this port speaks gRPC without TLS, not HTTP without TLS; check that the URL is grpc://{}"),
        ("grpcs", "grpc", "this port speaks gRPC without TLS, not gRPC over TLS; check that the URL is grpc://{}"),
        ("https", "http", "this port speaks HTTP without TLS, not HTTP over TLS; check that the URL is http://{}"),
        ("grpcs", "http", "this port speaks HTTP without TLS, not gRPC over TLS; check that the URL is http://{}"),
        ("https", "grpc", "this port speaks gRPC without TLS, not HTTP over TLS; check that the URL is grpc://{}"),
    ],
)
def test_wrong_scheme_for_the_port_is_told_at_once_with_the_right_one(toy_server, scheme, port_of, advice):
    target = toy_server.grpc_url if port_of == "grpc" else toy_server.http_url
    check_advice(f"{scheme}://{target}", advice.format(target))


@pytest.mark.parametrize(("scheme", "right"), [("grpc", "grpcs"), ("http", "https")])
def test_port_that_wants_tls_is_told(guarded_server, tls_proxy, scheme, right):
    port = guarded_server.grpc_url.rpartition(":")[2] if scheme == "grpc" else tls_proxy.port
    check_advice(f"{scheme}://localhost:{port}", f"check that the URL is {right}://localhost:{port}")


def check_advice(url: str, advice: str) -> None:
    for client in (blocking_error, asyncio_error):
        start = time.monotonic()
        error = client(url)
        assert advice in str(error)
        assert error.misconfigured
        assert time.monotonic() - start < 8


def blocking_error(url: str) -> ServerUnreachableError:
    with AudioLDM2Client(url, max_retries=1000) as client, pytest.raises(ServerUnreachableError) as caught:
        client.generate("a dog")
    return caught.value


def asyncio_error(url: str) -> ServerUnreachableError:
    async def generate() -> None:
        async with AsyncAudioLDM2Client(url, max_retries=1000) as client:
            await client.generate("a dog")

    with pytest.raises(ServerUnreachableError) as caught:
        asyncio.run(generate())
    return caught.value


def test_batch_does_not_wait_for_a_wrong_port(toy_server, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("a dog\n")
    arguments = ["--prompts", str(tmp_path / "p.txt"), "--output-dir", str(tmp_path / "out"), "--retry-for", "600"]
    assert main([*arguments, "--url", f"http://{toy_server.grpc_url}"]) == 3
    assert "speaks gRPC" in capsys.readouterr().err


def test_other_grpc_server_and_http1_in_its_place_are_told():
    for answer in (b"HTTP/1.1 502 Bad Gateway\r\n\r\n<html>", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"SSH-2.0-x\r\n"):
        with Answering(answer) as server, pytest.raises(ServerUnreachableError):
            generate(f"grpc://127.0.0.1:{server.port}", max_retries=0, timeout_s=20)


@pytest.fixture
def quick_heart(monkeypatch) -> None:
    """Signs of life many times a second, so that their absence is noticed soon."""
    for module in (_transport, _async_transport):
        monkeypatch.setattr(module, "HEARTBEAT_S", 0.3)
    monkeypatch.setattr(_network, "PING_AFTER_S", 0.8)
    monkeypatch.setattr(_network, "PING_TIMEOUT_S", 0.8)


@pytest.fixture
def relay(toy_server: EmbeddedServer, protocol: str):
    with Relay(toy_server.grpc_url if protocol == "grpc" else toy_server.http_url) as relay:
        yield relay


def lose_blocking(url: str, lose: Callable[[str], None]) -> None:
    with AudioLDM2Client(url, timeout_s=120, max_retries=0) as client:
        generation = client.submit("a dog", num_inference_steps=100)
        lose(generation.id)
        with pytest.raises(ServerUnreachableError) as caught:
            generation.result(20)
        assert not caught.value.safe_to_retry
        assert client.generate("a cat", seed=7).seed == 7


def lose_asyncio(url: str, lose: Callable[[str], None]) -> None:
    async def test() -> None:
        async with AsyncAudioLDM2Client(url, timeout_s=120, max_retries=0) as client:
            generation = client.submit("a dog", num_inference_steps=100)
            await asyncio.to_thread(lose, generation.id)
            with pytest.raises(ServerUnreachableError) as caught:
                await generation.result(20)
            assert not caught.value.safe_to_retry
            assert (await client.generate("a cat", seed=7)).seed == 7

    asyncio.run(test())


@pytest.mark.usefixtures("quick_heart")
@pytest.mark.parametrize("lose", [lose_blocking, lose_asyncio])
def test_connection_that_is_forgotten_in_silence_is_noticed_within_seconds(relay, protocol, ask, lose):
    def forget(request_id: str) -> None:
        wait_until(lambda: ask(request_id).state == "denoising", 20, "it is being generated")
        relay.forget()

    lose(f"{protocol}://127.0.0.1:{relay.port}", forget)


@pytest.mark.usefixtures("quick_heart")
@pytest.mark.parametrize("lose", [lose_blocking, lose_asyncio])
def test_server_that_was_lost_in_silence_stops_what_it_runs(toy_server, ask, lose):
    with Relay(toy_server.grpc_url) as relay:
        ids = []

        def forget(request_id: str) -> None:
            ids.append(request_id)
            wait_until(lambda: ask(request_id).state == "denoising", 20, "it is being generated")
            relay.forget()

        lose(f"127.0.0.1:{relay.port}", forget)
    wait_until(lambda: ask(ids[0]).state in ("cancelled", "done"), 20, "the server has stopped it")


@pytest.mark.usefixtures("quick_heart")
def test_long_silence_of_a_server_that_works_is_no_loss(url, waiting):
    """Also over gRPC, whose servers end connections with too many pings: `too_many_pings` after the third."""
    with AudioLDM2Client(url, timeout_s=60, max_retries=0) as client:
        generation = client.submit(f"wait {waiting}")
        with pytest.raises(TimeoutError):
            generation.result(3)
        waiting.unlink()
        assert generation.result(20).audio.size


@pytest.mark.usefixtures("quick_heart")
def test_long_silence_is_no_loss_for_asyncio(url, waiting):
    async def test() -> None:
        async with AsyncAudioLDM2Client(url, timeout_s=60, max_retries=0) as client:
            generation = client.submit(f"wait {waiting}")
            with pytest.raises(TimeoutError):
                await generation.result(3)
            waiting.unlink()
            assert (await generation.result(20)).audio.size

    asyncio.run(test())


@pytest.mark.usefixtures("quick_heart")
def test_quiet_grpc_connection_is_kept_from_being_forgotten(toy_server, waiting):
    """Pings alone would not do: after two without data, gRPC sends no more of them for a minute."""

    async def test(url: str) -> None:
        async with AsyncAudioLDM2Client(url, timeout_s=60, max_retries=0) as client:
            generation = client.submit(f"wait {waiting}")
            with pytest.raises(TimeoutError):
                await generation.result(4)
            waiting.unlink()
            assert (await generation.result(20)).audio.size

    with Relay(toy_server.grpc_url, forgets_after_s=1.5) as relay:
        url = f"127.0.0.1:{relay.port}"
        with AudioLDM2Client(url, timeout_s=60, max_retries=0) as client:
            generation = client.submit(f"wait {waiting}")
            with pytest.raises(TimeoutError):
                generation.result(4)
            waiting.unlink()
            assert generation.result(20).audio.size
        asyncio.run(test(url))


GONE, TIMED_OUT = ServerUnreachableError("refused"), DeadlineExceededError("no answer")
BUSY_THERE, UNKNOWN = Progress("denoising", 3, 20), Progress("unknown")


@pytest.mark.parametrize(
    ("outcomes", "lost"),
    [
        ([BUSY_THERE] * 50, False),
        ([Progress("done")], False),
        ([Progress("done")] * 2, True),
        ([Progress("failed")] * 2, True),
        ([GONE] * 50, False),  # a relay for one connection
        ([BUSY_THERE] + [GONE] * (LOOKS_WITHOUT_A_SIGN - 1) + [BUSY_THERE] + [TIMED_OUT] * 3, False),
        ([BUSY_THERE] + [GONE] * LOOKS_WITHOUT_A_SIGN, True),
        ([BUSY_THERE] + [TIMED_OUT] * LOOKS_WITHOUT_A_SIGN, True),
        ([UNKNOWN] * 50, False),  # behind a load balancer it is another server
        ([BUSY_THERE, UNKNOWN] * 20, False),
        ([BUSY_THERE] + [UNKNOWN] * LOOKS_WITHOUT_A_SIGN, True),
    ],
)
def test_http_connection_is_lost_where_other_ones_say_so(outcomes, lost):
    silence = Silence()
    reasons = [silence.look(outcome, received=0) for outcome in outcomes]
    assert any(reasons[:-1]) is False
    assert (reasons[-1] is not None) == lost


def test_http_connection_on_which_something_arrives_is_not_lost():
    silence = Silence()
    assert [silence.look(Progress("done"), received=n) for n in range(1, 20)] == [None] * 19


def test_connection_that_is_made_while_the_client_is_closed_is_closed_too(monkeypatch):
    made = []

    def connect(*args, **options):
        made.append(create_connection(*args, **options))
        client.close()
        return made[-1]

    create_connection = socket.create_connection
    with Answering(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n") as server:
        client = AudioLDM2Client(f"http://127.0.0.1:{server.port}")
        monkeypatch.setattr(socket, "create_connection", connect)
        with client, pytest.raises(RuntimeError, match="closed"):
            client.is_ready()  # asks twice
        wait_until(lambda: made and all(one.fileno() == -1 for one in made), 5, "nothing stays open")


PATCHED = """
from gevent import monkey; monkey.patch_all()
import sys, time, gevent
from audioldm2_client import AudioLDM2Client
ticks = []
def tick():
    while True:
        ticks.append(1)
        gevent.sleep(0.02)
gevent.spawn(tick)
with AudioLDM2Client(sys.argv[1]) as client:
    running = [gevent.spawn(client.generate, "a dog", num_inference_steps=40, seed=seed) for seed in range(3)]
    gevent.joinall(running, timeout=30, raise_error=True)
    print([job.value.seed for job in running], len(ticks) > 20)
    generation = client.submit("a dog", num_inference_steps=1000)
    while generation.progress().state != "denoising":
        gevent.sleep(0.02)
    print(generation.cancel(), generation.done())
"""


def run_patched(url: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", PATCHED, url], capture_output=True, text=True, timeout=60)


def test_program_that_gevent_has_patched_generates_over_http_beside_its_other_greenlets(toy_server):
    done = run_patched(f"http://{toy_server.http_url}")
    assert (done.stdout, done.stderr) == ("[0, 1, 2] True\nTrue True\n", "")


def test_program_that_gevent_has_patched_is_told_to_use_http_instead_of_grpc(toy_server):
    done = run_patched(toy_server.grpc_url)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ValueError: url must be an http:// or https:// one in a program that gevent has patched")
