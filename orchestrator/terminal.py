"""What reaches a terminal came from files that others may have written."""


def visible(text: str) -> str:
    """The text with every control character spelled out: one could clear, colour or retitle.

    Line breaks stay. So do letters of every script.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
