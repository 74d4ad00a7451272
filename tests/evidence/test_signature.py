"""Signatures of records."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hamu_lightning.errors import HAMUStateError, HAMUValueError
from hamu_lightning.evidence import canonical, check_signature, make_record, sign
from tests.evidence.test_record import check


def write_keys(folder: Path, name: str) -> tuple[Path, Path]:
    """Write a private and a public key."""
    key = Ed25519PrivateKey.generate()
    private, public = folder / f"{name}.pem", folder / f"{name}.pub.pem"
    pem, none = serialization.Encoding.PEM, serialization.NoEncryption()
    private.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, none))
    public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public


def test_a_signature_is_of_every_word_and_of_one_key(tmp_path: Path) -> None:
    private, public = write_keys(tmp_path, "mine")
    _, other = write_keys(tmp_path, "other")
    record = sign(make_record(requests={"größe": [1, 2]}), private)
    check(record)
    # A reader may write the file anew, in another order.
    again = json.loads(json.dumps(record, sort_keys=True, indent=7))
    assert check_signature(again) and check_signature(again, public)
    assert not check_signature(again, other)
    changed = copy.deepcopy(record)
    changed["requests"][0]["n"] = 3
    assert not check_signature(changed)
    for member in ("value", "public_key"):
        broken = {**record, "signature": {**record["signature"], member: "zz"}}
        assert not check_signature(broken)


def test_canonical_json_is_one_text() -> None:
    assert canonical({"b": [1, 0.1], "ä": None}) == '{"b":[1,0.1],"ä":null}'.encode()


def test_what_is_refused(tmp_path: Path) -> None:
    record = make_record(requests={})
    with pytest.raises(HAMUStateError, match="Expected a record with a signature"):
        check_signature(record)
    with pytest.raises(HAMUValueError, match="to be a PEM file with a private key, but it cannot be read"):
        sign(record, tmp_path / "none.pem")
    with pytest.raises(HAMUValueError, match="Expected `private_key` to be an Ed25519 key"):
        sign(record, ec.generate_private_key(ec.SECP256R1()))
