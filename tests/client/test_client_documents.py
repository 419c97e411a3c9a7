"""`docs/client.md` and the client's README: every example runs, every option is explained."""

import inspect
import shutil

import pytest
from audioldm2_client import AsyncAudioLDM2Client, AudioLDM2Client, Generation, _exceptions
from audioldm2_client._cli.options import make_parser

from tests.helpers.document_examples import ROOT, blocks, commands, places_of, run_commands, run_python
from tests.helpers.tls_server import KEY

GUIDE, README = "docs/client.md", "client/README.md"


@pytest.mark.parametrize("code", [code for document in (GUIDE, README) for code in blocks(document, "python")])
def test_python_example_runs(code, toy_server, tls_proxy, certificates, tmp_path, monkeypatch):
    for name in ("ca.pem", "client.pem", "client.key"):
        shutil.copy(certificates / name, tmp_path)
    monkeypatch.setenv("API_KEY", KEY)
    places = places_of(toy_server) | {"gpu-1.example:443": f"localhost:{tls_proxy.port}"}
    done = run_python(code, tmp_path, places)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("block", [block for document in (GUIDE, README) for block in blocks(document, "console")])
def test_console_example_runs(block, toy_server, tmp_path):
    done = run_commands(commands(block), tmp_path, places_of(toy_server))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


def test_guide_explains_every_option_of_the_package():
    text = (ROOT / GUIDE).read_text()
    for client in (AudioLDM2Client, AsyncAudioLDM2Client):
        for function in (client, client.generate, client.submit):
            for name in inspect.signature(function).parameters:
                assert name == "self" or f"`{name}`" in text, name
    for name in ("done", "result", "progress", "cancel"):
        assert hasattr(Generation, name)
        assert f"| `{name}(" in text


def test_blocking_and_asyncio_clients_have_the_same_arguments():
    for name in (
        "__init__",
        "generate",
        "submit",
        "is_ready",
        "wait_until_ready",
        "cancel_all",
        "close_on_signals",
        "close",
    ):
        blocking, twin = (inspect.signature(getattr(c, name)) for c in (AudioLDM2Client, AsyncAudioLDM2Client))
        assert blocking.parameters == twin.parameters, name


def test_guide_explains_every_option_of_the_command():
    text = (ROOT / GUIDE).read_text()
    for action in make_parser()._actions:
        for option in action.option_strings:
            assert f"`{option}`" in text, option


@pytest.mark.parametrize("document", [GUIDE, README])
def test_document_explains_every_error(document):
    text = (ROOT / document).read_text()
    for name, error in vars(_exceptions).items():
        assert not inspect.isclass(error) or f"`{name}`" in text, name


def test_readmes_table_of_errors_is_the_guides():
    def statuses(document: str) -> dict[str, str]:
        rows = [line.split("|") for line in (ROOT / document).read_text().splitlines() if line.startswith("| `")]
        return {row[1].strip(): row[3].strip()[0] for row in rows if "Error`" in row[1]}

    assert statuses(GUIDE) == statuses(README)
