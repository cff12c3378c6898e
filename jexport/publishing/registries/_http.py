"""HTTP to one OCI registry: requests with a deadline, its login, faults that may pass told apart.

Credentials go to the registry's own host and, for a token, to the place that it names, over TLS or
to this machine only. Knows no path of the registry's API.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urljoin, urlsplit

from jexport.errors import RegistryError
from jexport.publishing.registries import THREADS
from jexport.publishing.registries._login import login
from jexport.publishing.retry import TransientError
from jexport.redact import brief, redact

CONNECT_S, READ_S = 10, 60
STORED_S = 600
"""For the answer to a whole file: the registry hashes it first."""

PASSING = (408, 425, 429, 500, 502, 503, 504)
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Client:
    """A registry's host. Raises TransientError and RegistryError, without credentials."""

    def __init__(self, host: str, *, plain_http: bool) -> None:
        import requests
        from requests.adapters import HTTPAdapter

        local = urlsplit(f"//{host}").hostname in LOOPBACK
        self.base = f"{'http' if local or plain_http else 'https'}://{host}"
        self.host = host
        self._authorization = ""
        self._lock = threading.Lock()
        self._session = requests.Session()
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(pool_maxsize=2 * THREADS, max_retries=0))

    def close(self) -> None:
        """Close its connections."""
        self._session.close()

    def ask(
        self,
        method: str,
        address: str,
        *,
        good: tuple[int, ...],
        headers: Mapping[str, str] | None = None,
        body: Any = None,
        stream: bool = False,
    ) -> Any:
        """One request. A 401 is answered with the login, once.

        Args:
            method: of HTTP.
            address: a path on the host, or a URL.
            good: status codes to return.
            headers: more than the login's.
            body: bytes, or a function that opens them anew.
            stream: whether the caller reads the answer's body piece by piece.

        Returns:
            A requests.Response with one of the `good` codes.

        Raises:
            TransientError: a fault that may pass.
            RegistryError: another code, or an address without TLS on a host that has it.
        """
        url = urljoin(self.base, address)
        if urlsplit(url).scheme == "http" and self.base.startswith("https:"):
            raise RegistryError(
                f"{self.host} sends us to an address without TLS",
                evidence=redact(url),
                fix="use a registry that does not",
            )
        used = self._authorization
        answer = self._send(method, url, used, headers, body, stream)
        if answer.status_code == 401 and "WWW-Authenticate" in answer.headers:
            answer.close()
            self._log_in(answer.headers["WWW-Authenticate"], used)
            answer = self._send(method, url, self._authorization, headers, body, stream)
        if answer.status_code not in good:
            raise self._fault(method, answer)
        return answer

    def _send(
        self,
        method: str,
        url: str,
        authorization: str,
        headers: Mapping[str, str] | None,
        body: Any,
        stream: bool,
    ) -> Any:
        ours = urlsplit(url).netloc == urlsplit(self.base).netloc

        def signed(request: Any) -> Any:
            if ours and authorization:
                request.headers["Authorization"] = authorization
            return request

        with self.wrapped_errors():
            return self._session.request(
                method,
                url,
                headers=dict(headers or {}),
                data=body() if callable(body) else body,
                auth=signed,
                stream=stream,
                timeout=(CONNECT_S, STORED_S if callable(body) else READ_S),
            )

    @contextlib.contextmanager
    def wrapped_errors(self) -> Iterator[None]:
        """Report what requests raises as errors of our own.

        Yields:
            Nothing.

        Raises:
            TransientError: no connection, a timeout, or an answer that broke off.
            RegistryError: a certificate that is not trusted, or anything else.
        """
        from requests import exceptions as wrong

        try:
            yield
        except wrong.SSLError as error:
            raise RegistryError(
                f"no safe connection to {self.host}",
                evidence=brief(error),
                fix="check its certificate (REQUESTS_CA_BUNDLE), or --plain-http where it has none",
            ) from error
        except (
            wrong.ConnectionError,
            wrong.Timeout,
            wrong.ChunkedEncodingError,
            wrong.ContentDecodingError,
        ) as error:
            raise TransientError(f"{self.host}: {brief(error)}") from error
        except wrong.RequestException as error:
            raise RegistryError(
                f"cannot ask {self.host}", evidence=brief(error), fix="check the address"
            ) from error

    def _log_in(self, challenge: str, used: str) -> None:
        """Get what the registry asks for, unless another thread just did."""
        with self._lock:
            if self._authorization != used:
                return
            scheme, _, rest = challenge.partition(" ")
            parameters = dict(re.findall(r'(\w+)="([^"]*)"', rest))
            known = login(self.host)
            if scheme.lower() == "bearer" and "realm" in parameters:
                self._authorization = f"Bearer {self._token(parameters, known)}"
            elif scheme.lower() == "basic" and known:
                import requests

                request = requests.Request("GET", self.base, auth=known).prepare()
                self._authorization = str(request.headers["Authorization"])

    def _token(self, challenge: Mapping[str, str], known: tuple[str, str] | None) -> str:
        realm = urlsplit(challenge["realm"])
        if known and realm.scheme != "https" and realm.hostname not in LOOPBACK:
            raise RegistryError(
                f"{self.host} asks for the login at an address without TLS",
                evidence=redact(challenge["realm"]),
                fix="use a registry that does not",
            )
        asked = {key: challenge[key] for key in ("service", "scope") if key in challenge}
        with self.wrapped_errors():
            answer = self._session.get(
                challenge["realm"],
                params=asked,
                auth=known,
                timeout=(CONNECT_S, READ_S),
                allow_redirects=False,
            )
        if answer.status_code != 200:
            raise self._fault("GET", answer)
        content = self.json(answer)
        return str(content.get("token") or content.get("access_token"))

    def json(self, answer: Any) -> Mapping[str, Any]:
        """The JSON object of an answer.

        Args:
            answer: a requests.Response.

        Returns:
            The object.

        Raises:
            RegistryError: it is no JSON, or no object.
        """
        with self.wrapped_errors():
            content = answer.json()
        if not isinstance(content, dict):
            raise RegistryError(
                f"{self.host} does not answer as an OCI registry",
                evidence=redact(f"{urlsplit(answer.url).path}: {type(content).__name__}"),
                fix="check the host",
            )
        return content

    def _fault(self, method: str, answer: Any) -> Exception:
        code = answer.status_code
        path = urlsplit(answer.url).path
        text = redact(f"{method} {path}: {code} {answer.reason}{_first_error(answer)}")
        if code in PASSING:
            pause = answer.headers.get("Retry-After", "")
            return TransientError(
                f"{self.host}: {text}", pause_s=float(pause) if pause.isdigit() else 0.0
            )
        if code in (401, 403):
            return RegistryError(
                f"{self.host} does not let us",
                evidence=text,
                fix=f"docker login {self.host} (or podman, or oras), with the rights it needs",
            )
        return RegistryError(
            f"{self.host} answered {code}",
            evidence=text,
            fix="check host and repository: oci://HOST[:PORT]/REPOSITORY",
        )


def _first_error(answer: Any) -> str:
    """What an OCI error body says, '' for anything else."""
    try:
        first = answer.json()["errors"][0]
        return f" ({first['code']}: {first.get('message', '')})"[:300]
    except Exception:  # any body at all
        return ""
