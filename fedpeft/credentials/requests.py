"""Certificate signing requests: a device proves that it holds its key, and says nothing else."""

from __future__ import annotations

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedpeft.credentials.certificates import MAX_PEM
from fedpeft.credentials.keys import PrivateKey
from fedpeft.errors import CredentialError


def make_request(key: PrivateKey) -> bytes:
    """A request in PEM. Its subject is empty: name and role are what the token or old certificate says."""
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM)


def read_requested_key(pem: bytes) -> ec.EllipticCurvePublicKey:
    """The key of a request, whose holder signed it; everything else in the request is ignored.

    Raises:
        CredentialError: not a request, too large, badly signed, or not a P-256 key.
    """
    try:
        if len(pem) > MAX_PEM:
            raise ValueError
        request = x509.load_pem_x509_csr(pem)
        key = request.public_key()
        if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
            raise ValueError
        if not request.is_signature_valid:
            raise ValueError
    except Exception:  # whatever the parser says of a stranger's bytes
        raise CredentialError(
            "no certificate signing request with a P-256 key that signed it came; send one in PEM"
        ) from None
    return key
