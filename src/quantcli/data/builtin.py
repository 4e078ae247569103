"""Text that every Python carries: the documentation topics behind `help()`."""

__all__ = ["builtin_texts"]


def builtin_texts() -> list[str]:
    """The topics of Python's language reference as plain English text, about 80 documents in a fixed order."""
    from pydoc_data.topics import topics

    # sorted: the same text on every run, whatever order a Python release stores them in
    return [topics[name] for name in sorted(topics)]
