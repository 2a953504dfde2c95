"""Tokens, passwords and keys taken out of whatever is printed, raised or written."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

HIDDEN = "<secret>"

_NAMES = (
    r"(?:password|passwd|passphrase|secret|credential|signature|api[_-]?key|access[_-]?key|private[_-]?key"
    r"|(?:hub|hf|auth|access|api|refresh|session|security)[_-]?token)"
)
"""How the name of a setting ends that holds a secret; ``num_tokens`` and ``eos_token`` do not."""

_KINDS = re.compile(
    r"""
      (?-i:\b(?:gh[oprsu]_|github_pat_|glpat-|xox[abprs]-|pypi-)[\w-]{8,})
    | (?-i:\bhf_[A-Za-z0-9]{12,})                        # of the hub; they hold letters alone
    | (?-i:\bsk-(?=[\w-]*\d|[\w-]{20})[\w-]{8,})
    | (?-i:\bA(?:KI|SI)A[A-Z0-9]{12,})                  # access keys of AWS
    | (?-i:\bAIza[\w-]{20,})                            # of Google
    | (?-i:\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*)           # JSON web tokens
    | (?<=://)[^/\s:@]*:[^/\s]+(?=@)                    # user:password@host
    | (?<=bearer\ )(?=\S{0,80}\d|\S{20})[\w.~+/=-]{8,}
    | (?<=[?&]sig=)[^\s&]{4,} | (?<=[?&]token=)[^\s&]{4,} | (?<=[?&]key=)[^\s&]{4,}
    """,
    re.VERBOSE | re.IGNORECASE,
)
_ASSIGNED = re.compile(rf"((?<![\w-])[\w-]{{0,40}}{_NAMES}[\"']?(?:\s*=\s*|\s*:\s*)[\"']?)[^\s\"'&,;<>]{{4,}}", re.I)
_OPTION = re.compile(rf"(--[\w-]{{0,40}}{_NAMES}\s+)[^\s-]\S{{7,}}", re.I)
_SECRET_NAME = re.compile(rf"(?:.*[_-])?{_NAMES}|token", re.I)


def redacted(value: Any) -> Any:
    """Return a value without what looks like a token, a password or a key; ``<secret>`` stands in its place.

    Strings are searched wherever they are in dictionaries and lists. A string under a name such as ``hub_token`` or
    ``api_key`` goes as a whole; numbers always stay, so that ``num_tokens`` does.
    """
    if isinstance(value, str):
        return _OPTION.sub(rf"\1{HIDDEN}", _ASSIGNED.sub(rf"\1{HIDDEN}", _KINDS.sub(HIDDEN, value)))
    if isinstance(value, dict):
        return {redacted(key): _named(key, item) for key, item in value.items()}
    return [redacted(item) for item in value] if isinstance(value, list | tuple) else value


def _named(name: Any, value: Any) -> Any:
    secret = isinstance(name, str) and isinstance(value, str) and _SECRET_NAME.fullmatch(name)
    return HIDDEN if secret and value else redacted(value)


def cleaned(say: Callable[[str], None]) -> Callable[[str], None]:
    """Return a function that says every line without its secrets."""
    return lambda line: say(redacted(line))
