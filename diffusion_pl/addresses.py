"""Credentials in addresses: refused before they are stored or printed, masked in others' messages.

Addresses are stored in config.yaml, checkpoints, exports and job scripts and appear in errors, all
of which are shared. So a password, token or signature in an address is refused, and the error names
the environment variables to set instead.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote_plus

from diffusion_pl.errors import UserError

MASK = "***"
# Longer than any address. The patterns are bounded too, so that no text takes minutes.
_LONGEST = 65_536
_MASKED = re.compile(r"(?<=[:/])\*\*\*@|=\*\*\*")

# Also with one or three slashes, as a slip or as pathlib writes it; C:/ is a drive.
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,30}(?:://|(?<=\w\w):/)[^\s'\"<>]*")
_BEGUN = r"(?:(?<=://)|(?<=\w\w:/)(?!/)|(?<=:///))"
# Before the host, after a colon: a password, which may contain slashes; not a port.
_PASSWORD = re.compile(
    _BEGUN + r"[^/?#@\s:\[]{0,300}:(?!\d{0,9}(?:[/?#]|$))[^\s]{0,300}@"
    rf"|{_BEGUN}[^/?#\s]{{0,300}}:[^/?#\s]{{0,300}}@"
)
# In these a name before the host is a token; in others, such as sftp://, a user name.
_USER = re.compile(
    r"\b((?:https?|s3a?|gs|gcs|webdavs?|davs?)(?::/{0,3}|//))[^/?#\s]{0,300}@", re.IGNORECASE
)
# As scp and rsync write it, and without a scheme; sha256 is the digest of a container's image.
_BARE = re.compile(
    r"(?://[^/\s:@]{0,300}|[^/\s:@=]{1,300}):[^\s:@/]{1,300}@(?!sha\d)[\w.-]+(?:[:/]|$)"
)
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]{0,30})(?::/|//)")
_PARAMETER = re.compile(r"(?<=[?&;#])([^=&;#?]+)=[^&;#]*")
_SECRET_WORD = re.compile(
    r"token|secret|passw|pwd|signature|credential|api[_-]?key|auth|private|session|jwt|access[_-]?key"
    r"|bearer|delegation|sessid"
    r"|^(?:sig|key|code|sas|hmac|pass|tok|access|googleaccessid|key-pair-id|policy)$",
    re.IGNORECASE,
)
# Tokens recognised by their form.
_TOKEN = re.compile(
    r"\b(?:gh[pousr]_\w{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|hf_[A-Za-z0-9]{20,}"
    r"|A(?:KI|SI)A[A-Z0-9]{16}|AIza[\w-]{30,}|xox[abprs]-[\w-]{10,}|sk-[A-Za-z0-9]{20,}"
    r"|eyJ[\w-]{8,500}\.[\w-]{8,500}\.[\w-]{8,})"
)
_HEADER = re.compile(r"\b(Bearer|Basic)\s+[\w.~+/=-]{8,}")

# What the libraries behind fsspec read, by the beginning of an address.
_INSTEAD = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_SAS_TOKEN, or AZURE_STORAGE_ACCOUNT_KEY",
    "hf": "HF_TOKEN",
    "http": """FSSPEC_HTTPS='{"client_kwargs": {"headers": {"Authorization": "..."}}}', or """
    """FSSPEC_HTTPS='{"client_kwargs": {"trust_env": true}}' and ~/.netrc""",
}
_LIKE = {"s3a": "s3", "gcs": "gs", "abfs": "az", "abfss": "az", "adl": "az", "https": "http"}


def credential_in(text: str) -> str | None:
    """The kind of credential in a text, without its value; None for none."""
    text = _MASKED.sub("", text[:_LONGEST])
    # A password may contain any character.
    whole = [text] if _ADDRESS.match(text) or _USER.match(text) else []
    for address in [*whole, *_ADDRESS.findall(text)]:
        if _PASSWORD.search(address):
            return "a password before the host"
        if _USER.search(address):
            return "a user or token before the host"
        for name in _secret_names(address):
            return f"the parameter {name!r}"
    if _BARE.match(text):
        return "a password before the host"
    return "a token" if _TOKEN.search(text) else None


def refuse_credentials(text: str, where: str) -> None:
    """Raise UserError for a text with a credential, which the message does not show."""
    found = credential_in(text)
    if found is not None:
        raise UserError(
            f"{where}: holds {found}, and addresses are kept with a run and shown; remove it, and "
            f"set {instead(text)}"
        )


def instead(text: str) -> str:
    """What to set in the environment in place of the credentials of an address."""
    schemes = _SCHEME.findall(text) or re.findall(r"^[A-Za-z0-9]+(?=:)", text) or ["s3"]
    # Addresses are chained by ::, and the last is the server's.
    scheme = schemes[-1].lower()
    scheme = _LIKE.get(scheme, scheme)
    return _INSTEAD.get(
        scheme, f"FSSPEC_{scheme.upper()}_PASSWORD and its like, which fsspec reads"
    )


def masked(text: str) -> str:
    """Replace the credentials of every address in a text, and all known tokens, by ***."""
    text, rest = text[:_LONGEST], text[_LONGEST:]
    text = _USER.sub(rf"\1{MASK}@", _PASSWORD.sub(f"{MASK}@", text))
    text = _ADDRESS.sub(lambda address: _PARAMETER.sub(_hidden, address[0]), text)
    return _HEADER.sub(rf"\1 {MASK}", _TOKEN.sub(MASK, text)) + rest


def without_credentials(node: Any) -> Any:
    """Replace credentials in a config tree, which earlier versions stored, by ***."""
    if isinstance(node, dict):
        return {name: without_credentials(child) for name, child in node.items()}
    if isinstance(node, list):
        return [without_credentials(child) for child in node]
    return masked(node) if isinstance(node, str) else node


def _hidden(match: re.Match[str]) -> str:
    secret = _SECRET_WORD.search(unquote_plus(match[1]))
    return f"{match[1]}={MASK}" if secret else match[0]


def _secret_names(address: str) -> Iterator[str]:
    for name in _PARAMETER.findall(address):
        plain = unquote_plus(name)
        if _SECRET_WORD.search(plain):
            yield plain
