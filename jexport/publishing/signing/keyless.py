"""Sigstore without a key of one's own: a token of an identity instead. Needs a network.

Not run where jexport is developed: there is no network. What is tested there is that the real code
is reached and that its failure is told as one.
"""

from __future__ import annotations

import json
from typing import Any

from jexport.errors import SignatureError
from jexport.publishing.signing import Policy


def token(given: str) -> str:
    """An identity token: the one given, else the machine's own (CI), else asked for in a browser.

    Args:
        given: an OpenID token, '' for none.

    Returns:
        The token as text.

    Raises:
        SignatureError: none is to be had.
    """
    from sigstore import models, oidc

    try:
        identity_token = given or oidc.detect_credential()
        if identity_token:
            return str(oidc.IdentityToken(identity_token))
        issuer = models.ClientTrustConfig.production().signing_config.get_oidc_url()
        return str(oidc.Issuer(issuer).identity_token())
    except Exception as error:  # of identity providers, TUF, requests and Sigstore itself
        raise _offline("no identity to sign with", error) from error


def seal(statement: object, raw_token: str) -> bytes:
    """The statement, signed and logged by Sigstore.

    Args:
        statement: JSON-ready, an in-toto statement.
        raw_token: of the identity that signs.

    Returns:
        A Sigstore bundle as JSON, one line without its end.

    Raises:
        SignatureError: Sigstore did not sign.
    """
    from sigstore import dsse, models, oidc
    from sigstore import sign as signing

    payload = json.dumps(statement, sort_keys=True, ensure_ascii=False).encode()
    try:
        trust = models.ClientTrustConfig.production()
        context = signing.SigningContext.from_trust_config(trust)
        with context.signer(oidc.IdentityToken(raw_token)) as signer:
            bundle = signer.sign_dsse(dsse.Statement(payload))
    except Exception as error:  # as above
        raise _offline("Sigstore did not sign", error) from error
    return json.dumps(json.loads(bundle.to_json())).encode()


def opened(line: bytes, policy: Policy) -> Any:
    """The statement in such a line, once the identity asked for has signed it.

    Args:
        line: a Sigstore bundle as JSON.
        policy: its identity and issuer count.

    Returns:
        The statement, not checked further.

    Raises:
        SignatureError: in place of ValueError and Sigstore's own: it has not, this is no bundle, or
            there is no network.
    """
    from sigstore import models, verify

    try:
        roots = models.ClientTrustConfig.production().trusted_root
        asked = verify.policy.Identity(identity=policy.identity, issuer=policy.issuer)
        bundle = models.Bundle.from_json(line)
        kind, payload = verify.Verifier(trusted_root=roots).verify_dsse(bundle, asked)
        if kind != "application/vnd.in-toto+json":
            raise ValueError(f"its payload is {kind!r:.60}")
        return json.loads(payload)
    except Exception as error:  # a file that anybody may have written, or no network
        raise _offline("the provenance is not signed by whom it must be", error) from error


def _offline(what: str, error: Exception) -> SignatureError:
    first = next(iter(str(error).splitlines()), "")
    return SignatureError(
        what,
        evidence=f"{type(error).__name__}: {first}"[:300],
        fix="Sigstore needs a network and an identity; without them sign with --key, and check "
        "with the public key",
    )
