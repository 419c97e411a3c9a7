"""How a server is connected to: TLS files and headers. What is secret here is in no repr and in no message."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

_HEADER_NAME = re.compile(r"[a-z0-9!#$%&'*+.^_`|~-]+", re.IGNORECASE)
_HEADER_VALUE = re.compile(r"[!-~](?:[ -~]*[!-~])?")
# Those that the protocols, grpcio or httpx write themselves.
_RESERVED = re.compile(
    r"grpc-.*|.*-bin|host|te|connection|content-.*|transfer-encoding|inference-header-content-length|upgrade|user-agent"
)


@dataclass(frozen=True)
class TlsOptions:
    """Files for TLS, all in PEM format.

    Attributes:
        ca_file: the certificates that the server's is checked against; without it, the usual authorities.
        cert_file: this client's own certificate, where the server wants one.
        key_file: the private key of `cert_file`.
    """

    ca_file: str | os.PathLike[str] | None = None
    cert_file: str | os.PathLike[str] | None = None
    key_file: str | os.PathLike[str] | None = None

    def check(self) -> None:
        """Find out before the first call whether the files can be used.

        Raises:
            ValueError: one of certificate and key is missing, or a file has no PEM data.
            OSError: a file can't be read.
        """
        import ssl  # takes 10 ms

        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError("cert_file and key_file must be given together; got one of them")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        try:
            if self.ca_file is not None:
                context.load_verify_locations(self.ca_file)
        except ssl.SSLError as error:
            raise ValueError(f"ca_file must hold certificates in PEM format: {str(self.ca_file)!r}") from error
        try:
            if self.cert_file is not None:
                # An encrypted key is refused: OpenSSL would ask for its password on the terminal.
                context.load_cert_chain(self.cert_file, self.key_file, password="")
        except ssl.SSLError as error:
            raise ValueError(
                f"cert_file and key_file must hold a certificate and its unencrypted key in PEM format: "
                f"{str(self.cert_file)!r}"
            ) from error


@dataclass(frozen=True)
class ConnectionOptions:
    """What all connections of one client share.

    Attributes:
        tls: files for TLS; None means the defaults where the URL asks for TLS.
        headers: sent with every call, names in lower case.
    """

    tls: TlsOptions | None = None
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)


def sendable_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """Return those headers that gRPC and HTTP both can carry, with their names in lower case."""
    return {
        name.lower(): value
        for name, value in headers.items()
        if _HEADER_NAME.fullmatch(name) and not _RESERVED.fullmatch(name.lower()) and _HEADER_VALUE.fullmatch(value)
    }


def check_headers(headers: Mapping[str, str] | None) -> dict[str, str]:
    """Return the headers with their names in lower case, as gRPC wants them.

    Raises:
        TypeError: not text.
        ValueError: a name that can't be used, or a value that isn't printable ASCII. The value isn't shown.
    """
    checked = {}
    for name, value in (headers or {}).items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise TypeError("headers must map str to str")
        if not _HEADER_NAME.fullmatch(name) or _RESERVED.fullmatch(name.lower()):
            raise ValueError(f"headers must not hold {name!r}: it isn't a header's name, or one that is set here")
        if not _HEADER_VALUE.fullmatch(value):
            raise ValueError(f"the value of header {name!r} must be printable ASCII without spaces around it")
        checked[name.lower()] = value
    return checked
