"""Keys, certificates and a signed artifact, made anew for each session."""

from __future__ import annotations

import datetime
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from jexport.publishing import signing

NOW = datetime.datetime.now(datetime.UTC)
WHO = "release@example.org"
PROVIDER = "https://login.example.org"


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A private key, its public half, and a certificate for it where there is one."""

    private: Path
    public: Path
    certificate: Path | None = None


def private_pem(key: Any, password: bytes = b"") -> bytes:
    how: Any = serialization.NoEncryption()
    if password:
        how = serialization.BestAvailableEncryption(password)
    return bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, how)
    )


def write_pair(folder: Path, name: str, key: Any, password: bytes = b"") -> Pair:
    private, public = folder / f"{name}.key", folder / f"{name}.pub"
    private.write_bytes(private_pem(key, password))
    public.write_bytes(
        key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    return Pair(private=private, public=public)


def certificate(
    name: str,
    key: Any,
    issuer: str,
    issuer_key: Any,
    *,
    leads: bool,
    who: str = "",
    provider: str = "",
    days: float = 30,
) -> bytes:
    """A certificate as PEM. leads: it may sign others. days: until it expires."""
    built = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, issuer)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW - datetime.timedelta(days=1))
        .not_valid_after(NOW + datetime.timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=leads, path_length=None), critical=True)
        .add_extension(
            x509.KeyUsage(
                digital_signature=not leads,
                content_commitment=False,
                key_encipherment=False,
                data_encipherment=False,
                key_agreement=False,
                key_cert_sign=leads,
                crl_sign=leads,
                encipher_only=False,
                decipher_only=False,
            ),
            critical=True,
        )
    )
    if who:
        built = built.add_extension(
            x509.SubjectAlternativeName([x509.RFC822Name(who)]), critical=False
        )
    if provider:
        text = provider.encode()
        der = b"\x0c" + bytes([len(text)]) + text
        oid = x509.ObjectIdentifier("1.3.6.1.4.1.57264.1.8")
        built = built.add_extension(x509.UnrecognizedExtension(oid, der), critical=False)
    made = built.sign(issuer_key, hashes.SHA256())
    return made.public_bytes(serialization.Encoding.PEM)


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A key pair."""
    return write_pair(
        tmp_path_factory.mktemp("keys"), "own", ec.generate_private_key(ec.SECP256R1())
    )


@pytest.fixture(scope="session")
def other_keys(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Somebody else's."""
    return write_pair(
        tmp_path_factory.mktemp("keys"), "other", ec.generate_private_key(ec.SECP256R1())
    )


@dataclass(frozen=True, kw_only=True)
class Authority:
    """A root certificate, one between, and what they certify."""

    folder: Path
    root: Path
    between: Path
    between_key: Any

    def issue(self, name: str, *, who: str = "", provider: str = "", days: float = 30) -> Pair:
        key = ec.generate_private_key(ec.SECP384R1())
        pair = write_pair(self.folder, name, key)
        path = self.folder / f"{name}.pem"
        path.write_bytes(
            certificate(
                name,
                key,
                "between",
                self.between_key,
                leads=False,
                who=who,
                provider=provider,
                days=days,
            )
        )
        return Pair(private=pair.private, public=pair.public, certificate=path)


def authority(folder: Path) -> Authority:
    root_key, between_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    root, between = folder / "root.pem", folder / "between.pem"
    root.write_bytes(certificate("root", root_key, "root", root_key, leads=True))
    between.write_bytes(certificate("between", between_key, "root", root_key, leads=True))
    return Authority(folder=folder, root=root, between=between, between_key=between_key)


@pytest.fixture(scope="session")
def trusted(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return authority(tmp_path_factory.mktemp("trusted"))


@pytest.fixture(scope="session")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return authority(tmp_path_factory.mktemp("stranger"))


@pytest.fixture
def signed(artifact_copy: Path, keys: Pair) -> Path:
    """A copy of an artifact, signed with `keys`."""
    signing.sign(artifact_copy, signing.Signer(key=keys.private))
    return artifact_copy


def copy_with_attest(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    shutil.copytree(signing.attest_folder(folder), signing.attest_folder(to))
    return to
