"""publish, list, pull and open_artifact against real servers here: moto's S3, Debian's registry."""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import jexport
from jexport.artifacts import manifest
from jexport.errors import RegistryError
from jexport.publishing import listing, pull, registries
from jexport.publishing.registries import Access
from jexport.stages import publish
from jexport.stages.publish import PublishSpec
from jexport.types import Artifact

HERE = Path(__file__).parent
PROJECT = HERE.parents[2]
UNPACKED = PROJECT / ".servers" / "docker-registry"
USER, PASSWORD = "ana", "a-test-password"
HTPASSWD = f"{USER}:$2y$05$abcdefghijklmnopqrstuukvYklUfnuUBF63ESy2SqVoti7eMfK2C\n"
ATTEST = {"model.sig": b"signed", "empty": b""}
BIG_BYTES = 120 << 20
"""More than s3fs sends in one piece."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """One server: where a destination on it is, also through another port, and its files."""

    kind: str
    port: int
    files: Path

    def dest(self, name: str, port: int = 0) -> str:
        if self.kind == "oci":
            return f"oci://127.0.0.1:{port or self.port}/team/{name}"
        os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{port or self.port}"
        return f"s3://bucket/{name}"


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def started(words: list[Any], log: Path, url: str, **env: str) -> subprocess.Popen[bytes]:
    """A server that answers at `url`."""
    with open(log, "wb") as out:
        process = subprocess.Popen(
            list(map(str, words)), stdout=out, stderr=out, env={"PATH": os.environ["PATH"], **env}
        )
    for _ in range(300):
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return process
        except urllib.error.HTTPError:
            return process
        except OSError:
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
    process.kill()
    raise AssertionError(f"{words[0]} does not answer: {log.read_text()}")


def stopped(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def program() -> str:
    """Debian's docker-registry, from the system or unpacked by `make test-servers`."""
    unpacked = UNPACKED / "usr" / "bin" / "docker-registry"
    found = str(unpacked) if unpacked.is_file() else shutil.which("docker-registry")
    if found is None:
        pytest.skip("no docker-registry: neither installed nor to be had with apt-get download")
    return found


@pytest.fixture(scope="session")
def start_registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """`start_registry(login=True)`: an OCI registry, with a login or without."""
    running = []

    def start(*, login: bool = False) -> Server:
        room, port = tmp_path_factory.mktemp("registry"), free_port()
        (room / "htpasswd").write_text(HTPASSWD)
        config: dict[str, Any] = {
            "version": "0.1",
            "storage": {"filesystem": {"rootdirectory": str(room / "files")}},
            "http": {"addr": f"127.0.0.1:{port}", "secret": "of this test"},
        }
        if login:
            config["auth"] = {"htpasswd": {"realm": "here", "path": str(room / "htpasswd")}}
        (room / "config.yml").write_text(json.dumps(config))  # JSON is YAML
        words = [program(), "serve", room / "config.yml"]
        running.append(started(words, room / "log", f"http://127.0.0.1:{port}/v2/"))
        return Server(kind="oci", port=port, files=room / "files")

    yield start
    for process in running:
        stopped(process)


@pytest.fixture(scope="session")
def oci(start_registry: Callable[..., Server]) -> Server:
    return start_registry()


@pytest.fixture(scope="session")
def s3(
    environment: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    room, port = tmp_path_factory.mktemp("s3"), free_port()
    python = environment("registry") / "bin" / "python"
    url = f"http://127.0.0.1:{port}"
    words = [python, "-m", "moto.server", "-H", "127.0.0.1", "-p", port]
    process = started(words, room / "log", f"{url}/moto-api/", HOME=str(room))
    try:
        signed = {"Authorization": "AWS4-HMAC-SHA256 Credential=a/20200101/us-east-1/s3/x"}
        make = urllib.request.Request(f"{url}/bucket", method="PUT", headers=signed)
        urllib.request.urlopen(make).close()
        yield Server(kind="s3", port=port, files=room)
    finally:
        stopped(process)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nobody's own logins, and a cache of this test."""
    room = tmp_path / "home"
    room.mkdir()
    for name, value in {
        "HOME": str(room),
        "DOCKER_CONFIG": str(room),
        "JEXPORT_CACHE": str(room / "cache"),
        "AWS_ACCESS_KEY_ID": "AKIATESTTESTTEST",
        "AWS_SECRET_ACCESS_KEY": "an-s3-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_CONFIG_FILE": str(room / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(room / "none"),
        "NO_PROXY": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    return room


@pytest.fixture(params=["s3", "oci"])
def server(request: pytest.FixtureRequest, home: Path) -> Server:
    found: Server = request.getfixturevalue(request.param)
    return found


@pytest.fixture(scope="session")
def tools(imported: Callable[[Path], Any]) -> Any:
    """tests/publishing/registries/conftest.py: write_artifact, tree."""
    return imported(PROJECT / "tests" / "publishing" / "registries" / "conftest.py")


@pytest.fixture(scope="session")
def flaky(imported: Callable[[Path], Any]) -> Any:
    return imported(HERE / "flaky.py").in_front_of


@pytest.fixture
def made(tools: Any, tmp_path: Path) -> Callable[..., Artifact]:
    def make(seed: int = 0, **words: Any) -> Artifact:
        path = tools.write_artifact(tmp_path / f"built-{seed}", seed=seed, **words)
        beside = path.with_name(f"{path.name}.attest")
        beside.mkdir()
        for name, content in ATTEST.items():
            (beside / name).write_bytes(content)
        return Artifact(path=path, manifest=manifest.read(path))

    return make


def listed(dest: str) -> Any:
    return listing.read(registries.parse(dest), Access())


def pulled(ref: str, out: Path, **options: Any) -> Path:
    return pull.run(registries.parse(ref), out, **options).path


def test_there_and_back(
    server: Server, made: Callable[..., Artifact], tools: Any, tmp_path: Path
) -> None:
    dest = server.dest("back")
    first, second = made(1), made(2, task="retrieval.query", licence="CC-BY-NC-4.0")
    one = publish.run(first, dest, PublishSpec(tags=("latest", "1.0")))
    two = publish.run(second, dest, PublishSpec(tags=("latest",)))
    assert (one.sent, two.sent) == (one.files, two.files - 4)  # tokenizer, pooling, attestations
    assert publish.run(first, dest, PublishSpec()).sent == 0
    found = listed(dest)
    assert not found.troubles
    assert {row.ref: row.tags for row in found.rows} == {one.ref: ("1.0",), two.ref: ("latest",)}
    assert found.rows[-1].release.facts["licence"] == "CC-BY-NC-4.0"
    for ref, artifact in ((one.ref, first), (f"{dest}:1.0", first), (dest, second)):
        back = pulled(ref, tmp_path / "out")
        assert tools.tree(back) == tools.tree(artifact.path)
        assert tools.tree(back.with_name(f"{back.name}.attest")) == ATTEST
    with pytest.raises(RegistryError, match="no tag 'nightly'") as caught:
        pulled(f"{dest}:nightly", tmp_path / "out")
    assert "latest" in caught.value.evidence
    with pytest.raises(RegistryError, match="no release"):
        pulled(one.ref[:-4] + "0000", tmp_path / "out")


def test_one_digest_in_a_folder_too(
    server: Server, made: Callable[..., Artifact], tmp_path: Path
) -> None:
    artifact = made()
    there = publish.run(artifact, server.dest("same"), PublishSpec())
    here = publish.run(artifact, str(tmp_path / "folder"), PublishSpec())
    assert there.digest == here.digest


def test_the_program_leaves_this_machine_alone(
    server: Server, made: Callable[..., Artifact], home: Path, tmp_path: Path
) -> None:
    """Each command as a program that may connect to this machine only."""
    dest = server.dest("program")

    def run(*words: object) -> str:
        done = subprocess.run(
            [
                sys.executable,
                PROJECT / "tests" / "offline.py",
                PROJECT / "jexport" / "__main__.py",
                *map(str, words),
            ],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": str(PROJECT)},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    [ref] = run("publish", made().path, dest, "--tag", "latest").splitlines()
    [row] = json.loads(run("list", dest, "--json"))
    assert (row["ref"], row["tags"]) == (ref, ["latest"])
    [path] = run("pull", row["ref"], tmp_path / "out", "--quiet").splitlines()
    assert manifest.verify(Path(path))


@pytest.mark.parametrize("how", ["refuse", "after", "cut"])
def test_every_third_request_fails(
    server: Server,
    how: str,
    flaky: Any,
    made: Callable[..., Artifact],
    tools: Any,
    tmp_path: Path,
) -> None:
    artifact = made(3)
    with flaky(server.port, lambda n, *_: how if n % 3 == 0 else "") as proxy:
        dest = server.dest(f"third-{how}", proxy.port)
        done = publish.run(artifact, dest, PublishSpec(tags=("latest", "a", "b")))
        back = pulled(dest, tmp_path / "out")
        found = listed(dest)
        assert len(proxy.log) // 3 >= 8
    assert [(row.ref, row.tags) for row in found.rows] == [(done.ref, ("a", "b", "latest"))]
    assert tools.tree(back) == tools.tree(artifact.path)
    assert tools.tree(back.with_name(f"{back.name}.attest")) == ATTEST


def test_an_upload_cut_off_after_each_request_is_never_visible(
    server: Server, flaky: Any, made: Callable[..., Artifact], tmp_path: Path, monkeypatch: Any
) -> None:
    artifact = made(4)
    monkeypatch.setattr("jexport.publishing.retry.ATTEMPTS", 1)
    one = PublishSpec(tags=("latest",), threads=1)
    with flaky(server.port, lambda n, *_: "") as proxy:
        whole = publish.run(artifact, server.dest("cut-whole", proxy.port), one)
        count = len(proxy.log)
    assert count > 15
    seen = set()
    for last in range(0, count + 1, 1 if server.kind == "oci" else 3):
        # Dead from then on: nothing is tried again with success.
        with flaky(server.port, lambda n, *_, last=last: "refuse" if n > last else "") as proxy:
            dest = server.dest(f"cut-{last}", proxy.port)
            try:
                publish.run(artifact, dest, one)
                complete = True
            except RegistryError:
                complete = False
        dest = server.dest(f"cut-{last}")
        rows = () if last < 3 and server.kind == "s3" else listed(dest).rows
        for row in rows:  # visible: then whole
            assert manifest.verify(pulled(row.ref, tmp_path / f"out-{last}"))
        seen.add(bool(rows))
        assert rows or not complete
        again = publish.run(artifact, dest, one)
        assert again.digest == whole.digest
        [row] = listed(dest).rows
        assert row.tags == ("latest",)
    assert seen == {True, False}


def test_a_large_file_breaks_off_and_goes_on(
    server: Server, flaky: Any, made: Callable[..., Artifact], tmp_path: Path
) -> None:
    artifact = made(5)
    with open(artifact.path / "model.onnx", "ab") as stream:
        stream.write(os.urandom(1 << 20) * (BIG_BYTES >> 20))
    content = json.loads((artifact.path / manifest.NAME).read_text())
    files = [
        manifest.file_digest(p, root=artifact.path)
        for p in artifact.path.rglob("*")
        if p.is_file() and p.name != manifest.NAME
    ]
    content["files"] = manifest.listed(files)
    content["sha256"] = manifest.seal(content)
    manifest.write_json(artifact.path / manifest.NAME, content)
    artifact = Artifact(path=artifact.path, manifest=manifest.verify(artifact.path))
    done = publish.run(artifact, server.dest("large"), PublishSpec())
    broken: list[str] = []

    def fail(number: int, method: str, path: str) -> str:
        large = next(each for each in files if each.size_bytes > BIG_BYTES).sha256
        if method == "GET" and large in path and len(broken) < 2:
            broken.append(path)
            return "cut"
        return ""

    with flaky(server.port, fail) as proxy:
        dest = server.dest("large", proxy.port)
        back = pulled(registries.parse(dest).at(done.digest), tmp_path / "out")
        assert len(broken) == 2
    assert (back / "model.onnx").stat().st_size > BIG_BYTES
    assert manifest.verify(back)


def test_open_artifact(
    server: Server, artifact: Path, texts: list[str], tmp_path: Path, monkeypatch: Any
) -> None:
    dest = server.dest("opened")
    found = Artifact(path=artifact, manifest=manifest.read(artifact))
    done = publish.run(found, dest, PublishSpec(tags=("latest",)))
    with jexport.open_artifact(artifact) as model:
        wanted = model.encode(texts[:3])
    for ref in (f"{dest}:latest", done.ref):
        with jexport.open_artifact(ref) as model:
            assert (model.encode(texts[:3]) == wanted).all()
    monkeypatch.setattr(registries, "opened", None)  # offline: nothing is asked
    with jexport.open_artifact(done.ref) as model:
        assert (model.encode(texts[:3]) == wanted).all()


def test_corrupted_content_in_the_registry_is_refused(
    oci: Server, made: Callable[..., Artifact], tmp_path: Path
) -> None:
    artifact = made(6)
    dest = oci.dest("corrupted")
    done = publish.run(artifact, dest, PublishSpec())
    sha = manifest.file_digest(artifact.path / "model.onnx", root=artifact.path).sha256
    [kept] = oci.files.rglob(f"blobs/sha256/{sha[:2]}/{sha}/data")
    content = bytearray(kept.read_bytes())
    content[1000] ^= 1
    kept.write_bytes(content)
    with pytest.raises(RegistryError, match="does not hold what"):
        pulled(done.ref, tmp_path / "out")
    assert not (tmp_path / "out" / "m").exists()


def test_a_corrupted_object_is_refused_and_repaired(
    s3: Server, made: Callable[..., Artifact], tmp_path: Path
) -> None:
    artifact = made(7)
    dest = s3.dest("corrupted")
    done = publish.run(artifact, dest, PublishSpec())
    sha = manifest.file_digest(artifact.path / "model.onnx", root=artifact.path).sha256
    size = (artifact.path / "model.onnx").stat().st_size
    place = f"http://127.0.0.1:{s3.port}/bucket/corrupted/blobs/sha256/{sha}"
    headers = {
        "Authorization": "AWS4-HMAC-SHA256 Credential=a/20200101/us-east-1/s3/x",
        "Content-Type": "application/octet-stream",
    }
    for bad in (b"x" * size, b"x" * (size - 1), b"x" * (size + 1)):
        put = urllib.request.Request(place, data=bad, method="PUT", headers=headers)
        urllib.request.urlopen(put).close()
        with pytest.raises(RegistryError, match="does not hold what"):
            pulled(done.ref, tmp_path / "out")
        assert not (tmp_path / "out" / "m").exists()
    publish.run(artifact, dest, PublishSpec(repair=True))
    assert manifest.verify(pulled(done.ref, tmp_path / "out"))


def test_a_registry_with_a_login(
    start_registry: Callable[..., Server],
    made: Callable[..., Artifact],
    cli: Callable[..., Any],
    home: Path,
    tmp_path: Path,
) -> None:
    server = start_registry(login=True)
    artifact, dest = made(8), server.dest("private")
    for login in ("", f"{USER}:a-wrong-password"):
        kept = {"auth": base64.b64encode(login.encode()).decode()} if login else {}
        config = {"auths": {f"127.0.0.1:{server.port}": kept}}
        (home / "config.json").write_text(json.dumps(config))
        refused = cli("publish", artifact.path, dest)
        assert (refused.code, refused.out) == (33, "")
        assert "docker login" in refused.err
        assert "password" not in refused.err
    auth = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
    config = {"auths": {f"127.0.0.1:{server.port}": {"auth": auth}}}
    (home / "config.json").write_text(json.dumps(config))
    done = cli("publish", artifact.path, dest, "--tag", "latest")
    assert done.code == 0, done.err
    assert PASSWORD not in done.err
    assert manifest.verify(cli("pull", dest, tmp_path / "out", "--quiet").path)


def test_secrets_of_s3_are_not_said(
    s3: Server, made: Callable[..., Artifact], cli: Callable[..., Any], monkeypatch: Any
) -> None:
    dest = s3.dest("secret").replace("bucket", "no-such-bucket")
    refused = cli("publish", made().path, dest)
    assert refused.code == 33, refused.err
    assert "an-s3-secret" not in refused.err
    assert "AKIATEST" not in refused.err
    monkeypatch.setattr("jexport.publishing.retry.ATTEMPTS", 2)
    dead = cli("list", s3.dest("secret", 9))
    assert dead.code == 33, dead.err
    assert "failed 2 times" in dead.err
