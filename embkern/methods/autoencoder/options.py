"""The options of the autoencoder; the defaults are the recipe of the paper's authors."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ..base import Options


class AutoencoderOptions(Options):
    """Options of ``autoencoder``; the defaults are the configuration that the paper's authors released."""

    activation: Literal["elu"] | None = Field(
        None, description="elu: an ELU after the encoder and one after the decoder"
    )
    init: Literal["random", "svd"] = Field(
        "random", description="start from nn.Linear's initialisation or from the SVD"
    )
    cosine_weight: float = Field(0.9975 / 5, ge=0, description="of mean(1 - cos); the authors divide by 5")
    mse_weight: float = Field(0.0, ge=0, description="of mean((x - y)^2)")
    rmse_weight: float = Field(0.0, ge=0, description="of sqrt(mean((x - y)^2)), the root taken per batch")
    power_weight: float = Field(0.0025, ge=0, description="of mean((|x - y| + 1e-10)^alpha)")
    alpha_start: float = Field(1.0, gt=0, description="alpha in the first epoch")
    alpha_end: float = Field(0.1, gt=0, description="alpha after alpha_epochs")
    alpha_epochs: int = Field(20, ge=1, description="epochs over which alpha falls linearly")
    eps: float = Field(1e-6, gt=0, description="lower bound of |x||y| in the cosine")
    lr: float = Field(1e-3, gt=0, description="Adam's learning rate")
    lr_step: int = Field(4, ge=1, description="epochs between two steps of the learning rate")
    lr_gamma: float = Field(0.5, gt=0, le=1, description="factor of each step of the learning rate")
    batch_size: int = Field(32, ge=1, description="rows per step")
    epochs: int = Field(30, ge=1, description="passes over the table")
    seed: int = Field(1, ge=0, lt=2**32, description="seed of the initial weights and the order of rows")

    def alpha(self, epoch: int) -> float:
        """Return the exponent of the power term in an epoch, counted from 0."""
        return self.alpha_start + (self.alpha_end - self.alpha_start) * min(1.0, epoch / self.alpha_epochs)

    def learning_rate(self, epoch: int) -> float:
        """Return the learning rate in an epoch, counted from 0, like ``StepLR``."""
        return self.lr * self.lr_gamma ** (epoch // self.lr_step)
