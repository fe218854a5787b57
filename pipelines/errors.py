"""What is wrong with a model, a device or a setting, said in one line. Loads no torch."""

from __future__ import annotations


class ModelError(ValueError):
    """A model that cannot be audited or found, or a device or dtype that is not to be had.

    Args:
        message: one line that begins with the value: `my/model: no such folder; give ...`.
        about: what the value is: `model`, `device`, `dtype`, `clip`, `mask_layers`, `mask_token` or `steps`. A command
            line puts its flag before the message.
    """

    def __init__(self, message: str, about: str = "model") -> None:
        super().__init__(message)
        self.about = about


class NotFinite(ValueError):
    """A picture that overflowed: of this prompt and these flags, not of the model."""
