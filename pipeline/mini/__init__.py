"""The embedded model: small trained weights, and the rendered world with known answers that they were trained on."""

from pathlib import Path


def weights_path() -> Path:
    """The folder of the shipped weights, in the layout that transformers' `from_pretrained` reads."""
    return Path(__file__).with_name("weights")
