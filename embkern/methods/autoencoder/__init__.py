"""The paper's linear autoencoder, trained on the direction of every row."""

from .method import AutoencoderOptions, autoencoder

__all__ = ["AutoencoderOptions", "autoencoder"]
