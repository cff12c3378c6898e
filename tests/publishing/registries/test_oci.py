"""What OCI registries do that Debian's does not: tokens, redirects, ranges ignored, odd answers.

A small server here, one behaviour at a time; the real registry is in tests/servers/registry.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from jexport.errors import RegistryError
from jexport.publishing import listing, pull, registries
from jexport.publishing.registries import Access, _login
from jexport.publishing.registries._http import Client
from jexport.publishing.retry import TransientError
from jexport.stages import publish
from jexport.stages.publish import PublishSpec
from jexport.types import Artifact

USER, PASSWORD, TOKEN = "ana", "s3cretpass", "t0kent0ken"


class Registry(BaseHTTPRequestHandler):
    """Enough of the distribution spec to push and pull; `way` says how it behaves."""

    protocol_version = "HTTP/1.1"

    def say(self, code: int, content: bytes = b"", **headers: str) -> None:
        self.send_response_only(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def serve(self) -> None:
        server: Any = self.server
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        assert "chunked" not in self.headers.get("Transfer-Encoding", "")
        authorization = self.headers.get("Authorization", "")
        server.log.append((self.command, self.path, authorization))
        here = f"http://127.0.0.1:{server.server_address[1]}"
        path, _, query = self.path.partition("?")
        if path == "/token":
            basic = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
            if authorization != basic:
                return self.say(401, b'{"errors": [{"code": "DENIED"}]}')
            return self.say(200, json.dumps({"token": TOKEN}).encode())
        if path.startswith("/elsewhere/"):
            return self.say(200, server.blobs[path.rpartition("/")[2]])
        if "token" in server.way and authorization != f"Bearer {TOKEN}":
            realm = f'Bearer realm="{here}/token",service="s",scope="repository:r:pull,push"'
            return self.say(401, WWW_Authenticate=realm)
        name = path.rpartition("/")[2]
        if "odd" in server.way:
            return self.say(202 if self.command == "POST" else 200, b"[]")
        if path.endswith("/uploads/"):
            return self.say(202, Location="/v2/r/blobs/uploads/1?state=x")
        if self.command == "PUT" and "/uploads/" in path:
            digest = f"sha256:{hashlib.sha256(body).hexdigest()}"
            assert digest.replace(":", "%3A") in query
            server.blobs[digest] = body
            return self.say(201)
        if self.command == "PUT":
            digest = f"sha256:{hashlib.sha256(body).hexdigest()}"
            server.manifests[name] = server.manifests[digest] = body
            return self.say(201)
        if path.endswith("/tags/list"):
            tags = sorted(tag for tag in server.manifests if ":" not in tag)
            start = int(query.partition("last=")[2] or 0)
            more = {"Link": f'</v2/r/tags/list?n=1&last={start + 1}>; rel="next"'}
            page = json.dumps({"tags": tags[start : start + 1]}).encode()
            return self.say(200, page, **(more if start + 1 < len(tags) else {}))
        held = server.manifests if "/manifests/" in path else server.blobs
        if name not in held:
            return self.say(404)
        if "redirect" in server.way and "/blobs/" in path and self.command == "GET":
            return self.say(
                307, Location=f"http://localhost:{here[-5:].strip(':')}/elsewhere/{name}"
            )
        return self.say(200, held[name])  # whatever Range was asked for

    do_GET = do_HEAD = do_PUT = do_POST = serve

    def log_message(self, *words: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Any]:
    found: Any = ThreadingHTTPServer(("127.0.0.1", 0), Registry)
    found.way, found.log, found.blobs, found.manifests = set(), [], {}, {}
    thread = threading.Thread(target=found.serve_forever, daemon=True)
    thread.start()
    yield found
    found.shutdown()
    found.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    return tmp_path


def place(server: Any) -> str:
    return f"oci://127.0.0.1:{server.server_address[1]}/r"


def logged_in(home: Path, server: Any, password: str = PASSWORD) -> None:
    auth = base64.b64encode(f"{USER}:{password}".encode()).decode()
    host = f"127.0.0.1:{server.server_address[1]}"
    (home / "config.json").write_text(json.dumps({"auths": {host: {"auth": auth}}}))


def test_a_token_is_fetched_once_and_used(
    server: Any, home: Path, made: Callable[..., Artifact], tmp_path: Path
) -> None:
    server.way = {"token"}
    logged_in(home, server)
    done = publish.run(made(), place(server), PublishSpec(tags=("latest",), threads=1))
    assert [path for _, path, _ in server.log if path.startswith("/token")] == [
        "/token?service=s&scope=repository%3Ar%3Apull%2Cpush"
    ]
    # The password goes to the place of tokens, the token to the registry.
    for _, path, authorization in server.log[1:]:
        assert authorization.startswith("Basic " if path.startswith("/token") else "Bearer ")
    assert pull.run(registries.parse(done.ref), tmp_path / "out")


def test_a_wrong_password_is_not_said(
    server: Any, home: Path, made: Callable[..., Artifact]
) -> None:
    server.way = {"token"}
    logged_in(home, server, "wr0ngpass")
    with pytest.raises(RegistryError, match="does not let us") as caught:
        publish.run(made(), place(server), PublishSpec())
    assert "docker login" in caught.value.fix
    assert "wr0ngpass" not in str(caught.value)


def test_a_token_does_not_follow_a_redirect_to_another_host(
    server: Any, home: Path, made: Callable[..., Artifact], tmp_path: Path
) -> None:
    server.way = {"token", "redirect"}
    logged_in(home, server)
    done = publish.run(made(), place(server), PublishSpec())
    assert pull.run(registries.parse(done.ref), tmp_path / "out")
    followed = [each for each in server.log if each[1].startswith("/elsewhere/")]
    assert len(followed) >= 5
    assert {authorization for _, _, authorization in followed} == {""}


def test_a_registry_that_ignores_ranges(
    server: Any, made: Callable[..., Artifact], tmp_path: Path
) -> None:
    artifact = made()
    done = publish.run(artifact, place(server), PublishSpec())
    graph = (artifact.path / "model.onnx").read_bytes()
    room = tmp_path / "out" / ".pull" / done.digest.replace(":", "-")
    room.mkdir(parents=True)
    (room / f"{hashlib.sha256(graph).hexdigest()}.part").write_bytes(graph[:1000])
    back = pull.run(registries.parse(done.ref), tmp_path / "out")
    assert (back.path / "model.onnx").read_bytes() == graph


def test_tags_come_in_pages(server: Any, made: Callable[..., Artifact]) -> None:
    done = publish.run(made(), place(server), PublishSpec(tags=("latest", "b", "a")))
    [row] = listing.read(registries.parse(place(server)), Access()).rows
    assert (row.ref, row.tags) == (done.ref, ("a", "b", "latest"))


def test_a_server_that_is_no_registry(server: Any, made: Callable[..., Artifact]) -> None:
    server.way = {"odd"}
    with pytest.raises(RegistryError, match="does not answer as an OCI registry"):
        listing.read(registries.parse(place(server)), Access())
    with pytest.raises(RegistryError, match="no place to send a file to"):
        publish.run(made(), place(server), PublishSpec())


def test_another_machine_is_asked_over_tls_only() -> None:
    assert Client("registry.example", plain_http=False).base == "https://registry.example"
    assert Client("registry.example", plain_http=True).base == "http://registry.example"
    assert Client("localhost:5000", plain_http=False).base == "http://localhost:5000"
    assert Client("[::1]:5000", plain_http=False).base == "http://[::1]:5000"
    assert Client("localhost.example", plain_http=False).base == "https://localhost.example"
    client = Client("registry.example", plain_http=False)
    with pytest.raises(RegistryError, match="without TLS"):
        client.ask("PUT", "http://registry.example/v2/r/blobs/uploads/1", good=(201,))
    with pytest.raises(RegistryError, match="without TLS"):
        client._token({"realm": "http://tokens.example/"}, (USER, PASSWORD))


@pytest.mark.parametrize(
    ("code", "pause", "kind"),
    [
        (503, "7", TransientError),
        (429, "soon", TransientError),
        (500, "", TransientError),
        (403, "", RegistryError),
        (400, "", RegistryError),
    ],
)
def test_what_may_pass_is_told_from_what_does_not(code: int, pause: str, kind: type) -> None:
    import requests

    answer = requests.Response()
    answer.status_code, answer.reason = code, "Odd"
    answer.url = f"https://ana:{PASSWORD}@h/v2/r/blobs/x?token={TOKEN}"
    answer._content = json.dumps({"errors": [{"code": "C", "message": f"token={TOKEN}"}]}).encode()
    if pause:
        answer.headers["Retry-After"] = pause
    fault = Client("h", plain_http=False)._fault("GET", answer)
    assert type(fault) is kind
    assert TOKEN not in str(fault)
    assert PASSWORD not in str(fault)
    assert str(code) in str(fault)
    if isinstance(fault, TransientError):
        assert fault.pause_s == (7.0 if pause == "7" else 0.0)


def test_logins_of_docker_podman_and_helpers(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _login.login("h") is None
    (home / "config.json").write_text("{broken")
    assert _login.login("h") is None
    auth = base64.b64encode(b"u:p:w").decode()
    (home / "config.json").write_text(
        json.dumps(
            {
                "auths": {
                    "h": {"auth": auth},
                    "https://index.docker.io/v1/": {"auth": auth},
                    "odd": {"auth": "%%%"},
                    "none": {},
                },
                "credHelpers": {"helped": "tool", "evil": "../../bin/x", "gone": "missing"},
            }
        )
    )
    assert _login.login("h") == ("u", "p:w")
    assert _login.login("registry-1.docker.io") == ("u", "p:w")
    assert [_login.login(name) for name in ("odd", "none", "evil", "gone", "x")] == [None] * 5
    program = tmp_path / "docker-credential-tool"
    program.write_text(
        '#!/bin/sh\nread host\necho "{\\"Username\\": \\"$host\\", \\"Secret\\": \\"$1\\"}"\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert _login.login("helped") == ("helped", "get")
    runtime = tmp_path / "run"
    (runtime / "containers").mkdir(parents=True)
    (runtime / "containers" / "auth.json").write_text(
        json.dumps({"auths": {"pod": {"auth": auth}}})
    )
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    assert _login.login("pod") == ("u", "p:w")
