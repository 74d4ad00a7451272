"""Signatures of records: Ed25519 over canonical JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from hamu_lightning.errors import HAMUStateError, HAMUValueError


def canonical(record: Mapping[str, Any]) -> bytes:
    """Return what is signed: the record without its signature, as JSON with sorted names and without blanks, UTF-8.

    Example:
        >>> canonical({"b": 1, "a": [1.5, None], "signature": None})
        b'{"a":[1.5,null],"b":1}'
    """
    rest = {name: value for name, value in record.items() if name != "signature"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def sign(record: Mapping[str, Any], private_key: Any) -> dict[str, Any]:
    """Return the record with an Ed25519 signature (RFC 8032) of `canonical(record)`.

    It shows that whoever holds the key has signed just this; not that it is true, nor when it was signed.

    Args:
        record: From `make_record`.
        private_key: An `Ed25519PrivateKey` of `cryptography`, or the path of an unencrypted PEM file with one
            (`openssl genpkey -algorithm ed25519 -out key.pem`).

    Raises:
        HAMUStateError: If `cryptography` is not installed.
        HAMUValueError: If it is another key.
    """
    key = _load(private_key, "private") if isinstance(private_key, str | Path) else private_key
    if not isinstance(key, _ed25519().Ed25519PrivateKey):
        raise _wrong("private_key")
    public = key.public_key().public_bytes_raw().hex()
    return {
        **record,
        "signature": {"algorithm": "Ed25519", "public_key": public, "value": key.sign(canonical(record)).hex()},
    }


def check_signature(record: Mapping[str, Any], public_key: str | Path | None = None) -> bool:
    """Whether a record's signature is valid, for a given key or for the one that it names itself.

    Args:
        record: With a signature.
        public_key: Path of a PEM file (`openssl pkey -in key.pem -pubout`). Without it the signature only shows that
            nothing was changed since whoever made it.

    Raises:
        HAMUStateError: If there is no signature, or `cryptography` is not installed.
        HAMUValueError: If it is another key.
    """
    signature = record["signature"]
    if signature is None:
        raise HAMUStateError("Expected a record with a signature, but got none. Sign it: evidence.sign(record, key).")
    module = _ed25519()
    given = None if public_key is None else _load(public_key, "public")
    if given is not None and not isinstance(given, module.Ed25519PublicKey):
        raise _wrong("public_key")
    try:
        key = given or module.Ed25519PublicKey.from_public_bytes(bytes.fromhex(signature["public_key"]))
        key.verify(bytes.fromhex(signature["value"]), canonical(record))
    except (import_module("cryptography.exceptions").InvalidSignature, ValueError):  # ValueError: no hex, no key
        return False
    return True


def _ed25519() -> Any:
    try:
        return import_module("cryptography.hazmat.primitives.asymmetric.ed25519")
    except ImportError as error:
        raise HAMUStateError(
            "Expected cryptography for signatures, but it is not installed. Run: pip install hamu_lightning[sign]"
        ) from error


def _load(path: str | Path, kind: str) -> Any:
    _ed25519()
    serialization = import_module("cryptography.hazmat.primitives.serialization")
    try:
        data = Path(path).read_bytes()
        if kind == "private":
            return serialization.load_pem_private_key(data, password=None)
        return serialization.load_pem_public_key(data)
    except (OSError, ValueError, TypeError) as error:
        raise HAMUValueError(
            f"Expected {str(path)!r} to be a PEM file with a {kind} key, but it cannot be read: "
            f"{type(error).__name__}. Make one: openssl genpkey -algorithm ed25519 -out key.pem"
        ) from error


def _wrong(name: str) -> HAMUValueError:
    return HAMUValueError(
        f"Expected `{name}` to be an Ed25519 key, but got another one. Make one: openssl genpkey -algorithm ed25519 "
        "-out key.pem"
    )
