"""What cannot work is refused before tritonserver starts, in one sentence that says what to do."""

import os
import platform
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from server import EmbeddedServer, ServerError, checks, installation
from tests.helpers import tiny_repository as tiny


def refusal(repository: Path, **options) -> str:
    with pytest.raises(ServerError) as caught:
        EmbeddedServer(repository, **options).start()
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    return sentence


@pytest.fixture
def repository(tmp_path):
    tiny.add_double(tmp_path)
    return tmp_path


def test_a_missing_repository_is_refused_with_the_export_command(tmp_path):
    sentence = refusal(tmp_path / "nowhere")
    assert f"no model repository at {tmp_path / 'nowhere'}" in sentence
    assert f"python -m export --checkpoint DIR_OR_HUB_ID --output {tmp_path / 'nowhere'}" in sentence


def test_an_empty_repository_is_refused_with_the_export_command(tmp_path):
    assert "python -m export" in refusal(tmp_path)


def test_missing_weights_are_all_named_with_the_export_command(repository):
    for name in ("vae", "vocoder"):
        (tiny.add_double(repository, name) / "1" / "model.onnx").unlink()
    sentence = refusal(repository)
    assert "vae/1/model.onnx and vocoder/1/model.onnx are missing" in sentence
    assert f"python -m export --checkpoint DIR_OR_HUB_ID --output {repository}" in sentence
    assert "double" not in sentence


def test_a_missing_python_model_is_named(repository):
    model = tiny.add_python_model(repository, "unet", "", tiny.DOUBLE_CONFIG)
    (model / "1" / "model.py").unlink()
    assert "unet/1/model.py is missing" in refusal(repository)


def test_the_configured_file_name_is_the_one_that_is_looked_for(repository):
    config = repository / "double" / "config.pbtxt"
    config.write_text(f'{config.read_text()}default_model_filename: "other.onnx"\n')
    assert "double/1/other.onnx is missing" in refusal(repository)


def test_a_commented_backend_is_no_backend(repository):
    (repository / "double" / "config.pbtxt").write_text('# backend: "tensorrt"\nbackend: "onnxruntime"\n')
    checks.check_model_repository(repository)


def test_a_folder_that_is_no_model_is_refused_even_if_hidden(repository):
    (repository / ".cache").mkdir()
    assert f"{repository / '.cache'} has no config.pbtxt" in refusal(repository)


def test_a_model_without_a_version_folder_is_refused(repository):
    (repository / "double" / "1").rename(repository / "double" / "first")
    assert f"make {repository / 'double' / '1'}" in refusal(repository)


def test_a_backend_that_is_not_there_is_refused_by_name(repository):
    config = repository / "double" / "config.pbtxt"
    config.write_text(config.read_text().replace("onnxruntime", "tensorrt"))
    assert "'tensorrt'" in refusal(repository)


@pytest.mark.parametrize("argument", ["http_port", "grpc_port", "metrics_port"])
def test_a_taken_port_is_refused_with_its_number_and_the_option(repository, argument):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        sentence = refusal(repository, **{argument: port})
    assert f"Port {port} on 127.0.0.1 is taken" in sentence
    assert f"--{argument.replace('_', '-')}" in sentence


def test_one_port_for_two_endpoints_is_refused(repository):
    sentence = refusal(repository, http_port=8123, grpc_port=8123)
    assert "--http-port and --grpc-port are both 8123" in sentence


def test_a_port_out_of_range_is_refused(repository):
    assert "--grpc-port must be 0 to 65535" in refusal(repository, grpc_port=65536)


def test_an_address_of_another_machine_is_refused(repository):
    assert "no address 192.0.2.1" in refusal(repository, host="192.0.2.1")


def test_a_host_that_is_no_ipv4_address_is_refused(repository):
    assert "--metrics-host must be an IPv4 address" in refusal(repository, metrics_host="::1")


def test_free_ports_are_picked_apart():
    listeners = [checks.Listener(option, "127.0.0.1", 0) for option in ("a", "b", "c")]
    ports = checks.choose_ports(listeners)
    assert len(set(ports)) == 3
    assert 0 not in ports


@pytest.mark.parametrize(("system", "machine"), [("Darwin", "arm64"), ("Linux", "aarch64")])
def test_another_platform_is_refused_by_name(repository, monkeypatch, system, machine):
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert f"this is {system} on {machine}" in refusal(repository)


@pytest.mark.parametrize(("version", "found"), [("glibc 2.31", "glibc 2.31"), ("", "another C library")])
def test_an_old_or_foreign_c_library_is_refused(repository, monkeypatch, version, found):
    monkeypatch.setattr(os, "confstr", lambda _: version)
    assert f"this system has {found}" in refusal(repository)


def test_a_missing_wheel_is_refused_with_its_pip_command(repository, monkeypatch):
    monkeypatch.setattr(installation.importlib.util, "find_spec", lambda _: None)
    assert f"`pip install {installation.WHEEL}`" in refusal(repository)


def test_a_python_without_a_stub_is_refused_with_those_that_have_one(repository, monkeypatch):
    monkeypatch.setattr(installation, "PYTHON_VERSION", "3.99")
    monkeypatch.setattr(installation, "libpython_directory", lambda: Path("/"))
    sentence = refusal(repository)
    assert "no stub for Python 3.99" in sentence
    assert "3.9, 3.10, 3.11" in sentence


def test_a_static_python_is_refused(tmp_path):
    with pytest.raises(ServerError, match="has no shared library: libpython") as caught:
        installation.libpython_directory([tmp_path])
    assert str(tmp_path) in str(caught.value)


def test_finding_the_wheel_does_not_import_it():
    code = "import sys, server.installation as i; i.find_installation(); sys.exit('pytriton' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=tiny.ROOT, check=True, timeout=30)


def command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "server", *arguments],
        cwd=tiny.ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_command_prints_one_sentence_and_fails(tmp_path):
    result = command("--model-repository", str(tmp_path / "nowhere"))
    assert result.returncode == 1
    assert result.stderr.startswith("error: There is no model repository at ")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_the_command_warns_of_an_address_that_others_reach(tmp_path):
    result = command("--model-repository", str(tmp_path / "nowhere"), "--host", "0.0.0.0")  # noqa: S104 - refused first
    assert result.stderr.startswith("Warning: with --host 0.0.0.0 other machines reach this server")


def test_the_command_explains_every_option():
    text = command("--help").stdout
    for option in ("--model-repository", "--http-port", "--grpc-port", "--metrics-port", "--host", "--ready-timeout-s"):
        assert option in text
