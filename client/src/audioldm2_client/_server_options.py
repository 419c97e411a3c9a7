"""The options of both commands that say where the server is, and the client's settings that follow."""

import argparse
import os
from pathlib import Path
from typing import Any

from audioldm2_client._connection import TlsOptions
from audioldm2_client._core import DEFAULT_TIMEOUT_S, DEFAULT_URL
from audioldm2_client._jobs import DEFAULT_MODEL_NAME


def add_server_options(group: Any) -> None:
    """Add the options for the server's address and credentials, which `client_settings` reads."""
    group.add_argument(
        "--url",
        default=os.environ.get("AUDIOLDM2_URL") or DEFAULT_URL,
        help="HOST:PORT (gRPC), or with grpcs://, http:// or https://; several, with commas, for failover",
    )
    group.add_argument("--model", metavar="NAME", default=DEFAULT_MODEL_NAME, help="ensemble on the server")
    group.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=float,
        default=DEFAULT_TIMEOUT_S,
        help="for one generation; default: %(default)g",
    )
    group.add_argument("--ca-file", metavar="FILE", type=Path, help="certificates to check the server's against, PEM")
    group.add_argument("--cert-file", metavar="FILE", type=Path, help="the client's own certificate, PEM")
    group.add_argument("--key-file", metavar="FILE", type=Path, help="its private key, PEM")
    group.add_argument(
        "--api-key",
        metavar="KEY",
        default=os.environ.get("AUDIOLDM2_API_KEY"),
        help="sent as 'authorization: Bearer KEY'; AUDIOLDM2_API_KEY instead keeps it out of the list of processes",
    )
    group.add_argument(
        "--header", metavar="'NAME: VALUE'", action="append", default=[], help="sent with every call; repeatable"
    )


def client_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of a client.

    Raises:
        ValueError: a header that isn't "NAME: VALUE".
    """
    files = (arguments.ca_file, arguments.cert_file, arguments.key_file)
    return {
        "url": [url.strip() for url in arguments.url.split(",")],
        "model_name": arguments.model,
        "timeout_s": arguments.timeout,
        "tls": None if files == (None, None, None) else TlsOptions(*files),
        "headers": _headers(arguments),
    }


def _headers(arguments: argparse.Namespace) -> dict[str, str]:
    headers = {"authorization": f"Bearer {arguments.api_key}"} if arguments.api_key else {}
    for text in arguments.header:
        name, colon, value = text.partition(":")
        if not colon:
            raise ValueError("--header must be 'NAME: VALUE'; there is no colon in it")
        headers[name.strip().lower()] = value.strip()
    return headers
