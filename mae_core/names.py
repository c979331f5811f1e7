"""Names that came from elsewhere, of classes and files, as they can be shown."""

_JOINER = "\u200d"  # holds the parts of an emoji together


def printable(name: str) -> str:
    r"""Returns a name on one line, without what no terminal, table or font shows.

    Control characters, line breaks and the like are escaped as in Python (``\n``), and so are bytes that are not UTF-8
    (``\xff``), which Python keeps as lone surrogates that cannot be encoded. Letters and emoji stay.
    """
    return "".join(char if char.isprintable() or char == _JOINER else _escaped(char) for char in name)


def _escaped(char: str) -> str:
    if "\udc80" <= char <= "\udcff":
        return f"\\x{ord(char) - 0xDC00:02x}"
    return char.encode("unicode_escape").decode()
