"""An artifact's folder and its signer -> a model-signing signature, and back.

Only the public interface of OpenSSF's model-signing is used. It checks the signature and the files;
what it leaves open is checked here: that the signature covers every file (a signer may have left
some out, and the library then leaves them out, too), and whose certificate it was (the library
takes any that leads to the root). Knows no provenance.
"""

from __future__ import annotations

import base64
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jexport.errors import SignatureError
from jexport.publishing.signing import SIGNATURE, Policy, Signer

PREDICATE = "https://model_signing/signature/v1.0"
CURVES = ("secp256r1", "secp384r1", "secp521r1")
FULCIO_ISSUERS = ("1.3.6.1.4.1.57264.1.8", "1.3.6.1.4.1.57264.1.1")
"""Certificate extensions that name the OpenID provider: as DER, and as plain text (older)."""


def sign(folder: Path, signer: Signer, *, token: str = "") -> bytes:
    """The signature of a folder.

    Args:
        folder: every file in it is signed.
        signer: a key, a certificate, or Sigstore's identity.
        token: Sigstore's, for a signer without a key.

    Returns:
        The signature file's bytes.

    Raises:
        SignatureError: the key or certificate cannot be used, or Sigstore did not sign. Once a key
            is loaded, errors of the library stay what they are.
    """
    from model_signing import hashing, signing

    # Files of git count like any other: by default the library leaves them out.
    every = hashing.Config().set_ignored_paths(paths=(), ignore_git_paths=False)
    config = signing.Config().set_hashing_config(every)
    try:
        if signer.key is None:
            config.use_sigstore_signer(identity_token=token)
        elif signer.certificate is None:
            password = signer.password.encode() or None
            config.use_elliptic_key_signer(private_key=signer.key, password=password)
        else:
            config.use_certificate_signer(
                private_key=signer.key,
                signing_certificate=signer.certificate,
                certificate_chain=signer.chain,
            )
    except Exception as error:  # ValueError, TypeError, AttributeError, OSError, Sigstore's own
        raise _unusable("the signer cannot sign", error) from error
    try:
        with tempfile.TemporaryDirectory() as work_dir:
            signature = Path(work_dir) / SIGNATURE
            config.sign(folder, signature)
            return signature.read_bytes()
    except Exception as error:
        if signer.key is not None:
            raise
        raise _unusable("Sigstore did not sign", error) from error


def private_key(signer: Signer) -> Any:
    """The signer's key, for the provenance.

    Args:
        signer: one with a key.

    Returns:
        A private key of the package cryptography.

    Raises:
        SignatureError: in place of OSError, ValueError and the like: it cannot be read, or is of
            another curve.
    """
    from cryptography.hazmat.primitives import serialization

    try:
        assert signer.key is not None
        pem = Path(signer.key).read_bytes()
        key = serialization.load_pem_private_key(pem, signer.password.encode() or None)
        if key.curve.name not in CURVES:
            raise ValueError(f"its curve is {key.curve.name}")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise _unusable(f"the private key {signer.key} cannot be used", error) from error
    return key


def check(
    folder: Path, place: Path, policy: Policy, files: Mapping[str, str], *, called: str = ""
) -> Any:
    """Refuse a folder whose signature is not what the policy asks for.

    Args:
        folder: what was signed.
        place: the signature file.
        policy: whose signature is asked for.
        files: SHA-256 by name of all that must be signed.
        called: what errors name.

    Returns:
        The public key that has signed, None where Sigstore vouches for it.

    Raises:
        SignatureError: in place of ValueError and the library's own: it is broken, of somebody else
            or of something else, or there is no way to check it.
    """
    signature = place.read_bytes()
    bundle = _bundle(signature, policy)
    verifier = _verifier(policy)
    try:
        verifier.verify(folder, place)
        if place.read_bytes() != signature:
            raise ValueError("it was changed while it was read")
        listed = _listed(bundle)
        key = None if not (policy.key or policy.chain) else _public_key(bundle, policy)
    except SignatureError:
        raise
    except Exception as error:  # a file that anybody may have written: whatever it leads to
        raise _refused(called, f"{type(error).__name__}: {error}") from error
    if listed != dict(files):
        strange = sorted({name for name, _ in set(listed.items()) ^ set(files.items())})
        raise _refused(called, f"it is not about: {', '.join(strange)}")
    return key


def check_policy(policy: Policy) -> None:
    """Refuse a policy that nothing can be checked with.

    Args:
        policy: whose signature will be asked for.

    Raises:
        SignatureError: its key or root cannot be used.
    """
    _verifier(policy)


def _verifier(policy: Policy) -> Any:
    from model_signing import hashing, verifying

    config = verifying.Config().set_hashing_config(
        hashing.Config().set_ignored_paths(paths=(), ignore_git_paths=False)
    )
    try:
        if policy.key is not None:
            return config.use_elliptic_key_verifier(public_key=policy.key)
        if policy.chain:
            return config.use_certificate_verifier(certificate_chain=policy.chain)
        return config.use_sigstore_verifier(identity=policy.identity, oidc_issuer=policy.issuer)
    except Exception as error:  # no such file, not PEM, another kind of key, no network
        raise _unusable("what the signature must be checked with cannot be used", error) from error


def _bundle(signature: bytes, policy: Policy) -> dict[str, Any]:
    """A signature's own tree, in which no key stands twice or under another name.

    So what is read here is what the library reads.
    """
    try:
        bundle: dict[str, Any] = json.loads(signature, object_pairs_hook=_each_once)
        envelope, material = bundle["dsseEnvelope"], bundle["verificationMaterial"]
        sound = set(bundle) == {"mediaType", "verificationMaterial", "dsseEnvelope"}
        sound &= set(envelope) == {"payload", "payloadType", "signatures"}
        sound &= isinstance(material, dict) and len(envelope["signatures"]) == 1
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _refused("", f"it is no Sigstore bundle: {error!r:.120}") from error
    if not sound:
        raise _refused("", "it is no Sigstore bundle with one signature")
    signer, expected = _kind(material), "key" if policy.key else "certificate"
    if signer != expected:
        raise _refused("", f"it was made with a {signer or 'nothing known'}, not a {expected}")
    return bundle


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        raise ValueError("a key stands twice in it")
    return mapping


def _kind(material: Mapping[str, Any]) -> str:
    key = material.get("publicKey")
    if isinstance(key, dict):  # a signature that does not name its key makes the library print
        return "key" if key.get("hint") else ""
    known = ("x509CertificateChain", "certificate")
    return "certificate" if any(isinstance(material.get(one), dict) for one in known) else ""


def _listed(bundle: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 by name of what a signature covers."""
    payload = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    if payload["predicateType"] != PREDICATE:
        raise ValueError(f"it signs a {payload['predicateType']!r:.80}")
    resources = payload["predicate"]["resources"]
    listed = {one["name"]: one["digest"] for one in resources}
    if len(listed) != len(resources) or {one["algorithm"] for one in resources} != {"sha256"}:
        raise ValueError("it names a file twice, or not by SHA-256")
    return listed


def _public_key(bundle: Mapping[str, Any], policy: Policy) -> Any:
    """The key that signed; with certificates only that of the identity asked for."""
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization

    if policy.key is not None:
        return serialization.load_pem_public_key(Path(policy.key).read_bytes())
    raw = bundle["verificationMaterial"]["x509CertificateChain"]["certificates"][0]["rawBytes"]
    certificate = x509.load_der_x509_certificate(base64.b64decode(raw))
    names, issuers = _names(certificate), _issuers(certificate)
    if policy.identity not in names:
        raise _refused("", f"it is by {', '.join(names) or 'nobody'}, not by {policy.identity}")
    if policy.issuer and policy.issuer not in issuers:
        vouched = ", ".join(issuers) or "nobody"
        raise _refused("", f"{vouched} vouched for its identity, not {policy.issuer}")
    return certificate.public_key()


def _names(certificate: Any) -> list[str]:
    """Whom a certificate is for: its alternative names, else its common name."""
    from cryptography import x509

    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        return [
            name
            for kind in (x509.RFC822Name, x509.UniformResourceIdentifier, x509.DNSName)
            for name in names.get_values_for_type(kind)
        ]
    except x509.ExtensionNotFound:
        common = certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
        return [str(one.value) for one in common]


def _issuers(certificate: Any) -> list[str]:
    from cryptography import x509

    issuers = []
    for dotted in FULCIO_ISSUERS:
        try:
            extension = certificate.extensions.get_extension_for_oid(x509.ObjectIdentifier(dotted))
        except x509.ExtensionNotFound:
            continue
        raw = extension.value.value
        if dotted == FULCIO_ISSUERS[0] and len(raw) > 1 and raw[:1] == b"\x0c" and raw[1] < 128:
            raw = raw[2:]  # DER: UTF8String, length in one byte
        issuers.append(raw.decode("utf-8", "replace"))
    return issuers


def _refused(called: str, evidence: str) -> SignatureError:
    what = f"the signature of {called}" if called else "its signature"
    return SignatureError(
        f"{what} is not one that is asked for",
        evidence=next(iter(evidence.splitlines()), "")[:300],
        fix="do not use it; fetch it again from where it was published, with its .attest folder",
    )


def _unusable(what: str, error: Exception) -> SignatureError:
    first = next(iter(str(error).splitlines()), "")
    return SignatureError(
        what,
        evidence=f"{type(error).__name__}: {first}"[:300],
        fix="give an elliptic-curve key (P-256, P-384 or P-521) or certificate as PEM; Sigstore "
        "needs a network",
    )
