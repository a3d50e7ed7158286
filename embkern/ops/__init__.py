"""The ops of embkern. Each has one file, read top-down: fake, schema, autograd function, public function."""

from .autoencoder import autoencoder_loss
from .cosine_mse import cosine_mse_loss
from .gather_decode import gather_decode
from .gather_project import gather_project
from .library import DECOMPOSITIONS
from .low_rank_cross_entropy import low_rank_cross_entropy
from .packed_cross_entropy import packed_cross_entropy
from .packed_logits import packed_logits

__all__ = [
    "DECOMPOSITIONS",
    "autoencoder_loss",
    "cosine_mse_loss",
    "gather_decode",
    "gather_project",
    "low_rank_cross_entropy",
    "packed_cross_entropy",
    "packed_logits",
]
