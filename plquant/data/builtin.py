"""A text that every Python installation carries, so that a first run needs no file and no network."""

from typing import Any

from plquant.data.base import Split, TextData


class BuiltinText(TextData):
    """Python's own language reference (``pydoc_data.topics``), about 0.46 MB of English and code; needs no network.

    The first four fifths are for calibration, the last fifth for validation. Good for trying things out: the text
    changes a little with the Python version, and topics quote each other (7% of the held-out fifth has a twin in the
    calibration part, Python 3.11), so published perplexities want ``FileText`` or ``HubText``.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.save_hyperparameters()

    def text(self, split: Split) -> str:
        """The first four fifths of the characters (calibration) or the last fifth (validation)."""
        return builtin_text(split)

    def text_name(self, split: Split) -> str:
        """The package and the part taken."""
        return builtin_text_name(split)


def builtin_text(split: Split) -> str:
    """Topics in sorted order joined by blank lines, cut at four fifths of the characters."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    cut = len(text) * 4 // 5
    return text[:cut] if split == "calibration" else text[cut:]


def builtin_text_name(split: Split) -> str:
    """What :func:`builtin_text` returns, in words."""
    return f"pydoc_data.topics ({'first four fifths' if split == 'calibration' else 'last fifth'})"
