"""An in-toto statement and a key -> one line: a DSSE envelope, as .intoto.jsonl files hold it.

The signed bytes are those of https://github.com/secure-systems-lab/dsse (protocol 1.0.2); keys and
digests are those that model-signing takes. Knows neither what is stated nor whose key it is.
"""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any

from jexport.errors import SignatureError

PAYLOAD = "application/vnd.in-toto+json"


def seal(statement: object, key: Any) -> bytes:
    """The envelope around a statement, signed with an elliptic-curve private key.

    Args:
        statement: JSON-ready.
        key: a private key of the package cryptography.

    Returns:
        The envelope as JSON, one line without its end.
    """
    from cryptography.hazmat.primitives.asymmetric import ec

    payload = json.dumps(statement, sort_keys=True, ensure_ascii=False).encode()
    public = key.public_key()
    signature = key.sign(_signed(payload), ec.ECDSA(_digest_for(public)))
    envelope = {
        "payload": base64.b64encode(payload).decode(),
        "payloadType": PAYLOAD,
        "signatures": [
            {"keyid": key_id(public), "sig": base64.b64encode(signature).decode()},
        ],
    }
    return json.dumps(envelope).encode()


def opened(line: bytes, public: Any) -> Any:
    """The statement in an envelope, once this public key has signed it.

    Args:
        line: the envelope as JSON.
        public: an elliptic-curve public key of the package cryptography.

    Returns:
        The statement, not checked further.

    Raises:
        SignatureError: in place of ValueError and the like: it has not, or this is no envelope.
    """
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        envelope = json.loads(line)
        (one,) = envelope["signatures"]
        payload = base64.b64decode(envelope["payload"], validate=True)
        signature = base64.b64decode(one["sig"], validate=True)
        if envelope["payloadType"] != PAYLOAD:
            raise ValueError(f"its payload is {envelope['payloadType']!r:.60}")
        public.verify(signature, _signed(payload), ec.ECDSA(_digest_for(public)))
        return json.loads(payload)
    except InvalidSignature as error:
        raise _not_signed("its signature does not match") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _not_signed(f"{type(error).__name__}: {error}") from error


def key_id(public: Any) -> str:
    """SHA-256 of a public key as PEM: how model-signing names keys in its signatures.

    Args:
        public: a public key of the package cryptography.

    Returns:
        64 hex digits.
    """
    from cryptography.hazmat.primitives import serialization

    pem = public.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return hashlib.sha256(pem).hexdigest()


def _signed(payload: bytes) -> bytes:
    head = f"DSSEv1 {len(PAYLOAD)} {PAYLOAD} {len(payload)} "
    return head.encode() + payload


def _digest_for(public: Any) -> Any:
    """As long as the curve."""
    from cryptography.hazmat.primitives import hashes

    sizes = {256: hashes.SHA256, 384: hashes.SHA384, 521: hashes.SHA512}
    return sizes[public.curve.key_size]()


def _not_signed(evidence: str) -> SignatureError:
    return SignatureError(
        "the provenance is not signed by whom it must be",
        evidence=evidence[:200],
        fix="fetch the .attest folder again, or sign the artifact again",
    )
