"""Write a generation as Python and as curl, to be copied. Pure. Values of headers are never in it."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from audioldm2_client._connection import TlsOptions
from audioldm2_client._core import DEFAULT_TIMEOUT_S
from audioldm2_client._jobs import DEFAULT_MODEL_NAME
from audioldm2_client._url import parse_urls

_HTTP_PORT = 8000


@dataclass(frozen=True)
class Connection:
    """The settings of a client that may be shown.

    Attributes:
        urls: one or several, as the client takes them.
        model_name: the ensemble.
        timeout_s: for one generation, seconds.
        tls: files for TLS.
        header_names: headers sent with every call; the snippets take their values from the environment.
    """

    urls: Sequence[str]
    model_name: str
    timeout_s: float
    tls: TlsOptions | None
    header_names: Sequence[str]


def as_python(options: Mapping[str, Any], connection: Connection) -> str:
    """Return a program that generates the same again. `options` are the arguments of `generate`."""
    names = "AudioLDM2Client" if connection.tls is None else "AudioLDM2Client, TlsOptions"
    arguments = [
        repr(options["prompt"]),
        *(f"{name}={value!r}" for name, value in options.items() if name != "prompt"),
    ]
    return "\n".join(
        [
            *(["import os", ""] if connection.header_names else []),
            f"from audioldm2_client import {names}",
            "",
            f"with AudioLDM2Client({', '.join(_client_arguments(connection))}) as client:",
            "    result = client.generate(",
            *(f"        {argument}," for argument in arguments),
            "    )",
            "for index in range(len(result.audio)):",
            '    result.save(f"audio-{index + 1}.wav", index)',
            "",
        ]
    )


def as_curl(options: Mapping[str, Any], connection: Connection) -> str:
    """Return a command that generates the same again and prints the server's JSON."""
    address = parse_urls(list(connection.urls), with_tls_options=connection.tls is not None)[0]
    if address.protocol == "http":
        comment, place = "", str(address)
    else:
        host = address.target.rpartition(":")[0]
        place = f"http{'s' if address.secure else ''}://{host}:{_HTTP_PORT}"
        comment = f"# {_HTTP_PORT} is Triton's port for HTTP, unless configured\n"
    parts = [
        "curl",
        *_curl_files(connection.tls),
        *(f'-H "{name}: ${_variable(name)}"' for name in connection.header_names),
        f"-d {shlex.quote(json.dumps(options, ensure_ascii=False))}",
        shlex.quote(f"{place}/v2/models/{connection.model_name}/generate"),
    ]
    return comment + " \\\n  ".join(parts) + "\n"


def _client_arguments(connection: Connection) -> list[str]:
    arguments = [repr(connection.urls[0] if len(connection.urls) == 1 else list(connection.urls))]
    if connection.model_name != DEFAULT_MODEL_NAME:
        arguments.append(f"model_name={connection.model_name!r}")
    if connection.timeout_s != DEFAULT_TIMEOUT_S:
        arguments.append(f"timeout_s={connection.timeout_s!r}")
    if connection.tls is not None:
        files = ", ".join(f"{name}={path!r}" for name, path in _files(connection.tls).items())
        arguments.append(f"tls=TlsOptions({files})")
    if connection.header_names:
        headers = ", ".join(f'{name!r}: os.environ["{_variable(name)}"]' for name in connection.header_names)
        arguments.append(f"headers={{{headers}}}")
    return arguments


def _curl_files(tls: TlsOptions | None) -> list[str]:
    flags = {"ca_file": "--cacert", "cert_file": "--cert", "key_file": "--key"}
    return [] if tls is None else [f"{flags[name]} {shlex.quote(path)}" for name, path in _files(tls).items()]


def _files(tls: TlsOptions) -> dict[str, str]:
    named = {"ca_file": tls.ca_file, "cert_file": tls.cert_file, "key_file": tls.key_file}
    return {name: str(path) for name, path in named.items() if path is not None}


def _variable(header: str) -> str:
    """Return the environment variable that holds a header's value."""
    return "".join(character if character.isalnum() else "_" for character in header).upper()
