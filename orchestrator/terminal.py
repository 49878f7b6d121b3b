"""What reaches a terminal came from files that others may have written."""

from typing import Any


def visible(text: str) -> str:
    """The text with every control character spelled out: one could clear, colour or retitle.

    Line breaks stay. So do letters of every script.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def setting(name: str, value: Any) -> str:
    """`rank 8`, `ressa_compat`, `refine none`; a mapping as in YAML, but without spaces."""
    if value is True:
        return name
    if isinstance(value, dict):
        known = {key: each for key, each in value.items() if each and key != "fingerprint"}
        value = ",".join(f"{key}:{each}" for key, each in known.items())
    return f"{name} {'none' if value is None else value}"
