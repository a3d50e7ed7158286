"""The autoencoder of arXiv 2106.08181, trained on the direction of every row."""

from .method import autoencoder
from .options import AutoencoderOptions

__all__ = ["AutoencoderOptions", "autoencoder"]
