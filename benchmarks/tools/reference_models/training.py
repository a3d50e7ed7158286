"""The training of a reference model, in steps that can be interrupted and repeated."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import math
import platform
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from embkern.io.atomic import file_checksum, replacing, replacing_directory
from embkern.io.checked_json import read_checked_json, to_checked_json
from embkern.models.ngrammer import enable_ngrammer

from .corpus import blocks_of, first_texts, read_lines
from .kinds import KINDS, LENGTH, Kind, Losses, Recipe

TOKENIZER_CHARS = 12_000_000  # of the train text, for the tokenizers
CHECKPOINTS = 10  # in a whole run


def optimizers_of(model: nn.Module, recipe: Recipe, *, muon: bool) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of the layers if asked, and AdamW for the rest."""
    inner, tables, vectors = list[Tensor](), list[Tensor](), list[Tensor]()
    for name, parameter in model.named_parameters():
        in_layer = muon and (".h." in name or ".layer." in name)
        (vectors if parameter.ndim == 1 else inner if in_layer else tables).append(parameter)
    rate, decay = recipe.learning_rate, recipe.weight_decay
    groups: list[dict[str, Any]] = [{"params": tables}, {"params": vectors, "weight_decay": 0.0}]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), weight_decay=decay)
    ]
    if muon:
        optimizers += [torch.optim.Muon(inner, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw")]
    return optimizers


def rate_at(step: int, recipe: Recipe) -> float:
    """Return the share of the learning rate at a step: a warm-up, then a line to zero."""
    warmup = max(1, round(recipe.warmup * recipe.steps))
    return min((step + 1) / warmup, (recipe.steps - step) / max(1, recipe.steps - warmup))


def batch_at(step: int, blocks: Tensor, recipe: Recipe) -> Tensor:
    """Return the blocks of a step: epoch after epoch, each in an order of its own."""
    places = torch.arange(step * recipe.batch, (step + 1) * recipe.batch)
    epochs = (places // len(blocks)).tolist()
    orders = {each: _order(len(blocks), recipe.seed + 1000 * each) for each in set(epochs)}
    rows = [orders[epoch][place % len(blocks)] for epoch, place in zip(epochs, places, strict=True)]
    return blocks[torch.stack(rows)]


def _order(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


class Training:
    """A model in training: one step, its evaluation and its checkpoints."""

    def __init__(self, kind: Kind, recipe: Recipe, tokenizer: Any, device: str) -> None:
        self.kind, self.recipe, self.tokenizer, self.device = kind, recipe, tokenizer, device
        self.bfloat16 = has_bfloat16(device)
        torch.manual_seed(recipe.seed)
        self.model: Any = kind.model(recipe, tokenizer).to(device).train()
        if recipe.ngrammer is not None:
            enable_ngrammer(self.model, combine=recipe.ngrammer, seed=recipe.seed)
        # Muon learns more in a step, but its products are of bfloat16: very slow without instructions for it.
        self.optimizers = optimizers_of(self.model, recipe, muon=self.bfloat16)
        self.progress: dict[str, Any] = {"step": 0, "seconds": 0.0, "cpu_seconds": 0.0, "valid_losses": []}

    def advance(self, blocks: Tensor) -> None:
        """Take one step."""
        step = self.progress["step"]
        generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + step)
        loss = self._losses(batch_at(step, blocks, self.recipe), generator)[0].mean()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.recipe.learning_rate * rate_at(step, self.recipe)
            optimizer.step()
            optimizer.zero_grad()
        self.progress["step"] += 1

    @torch.no_grad()
    def evaluate(self, blocks: Tensor) -> Losses:
        """Return the losses on the blocks, under masks that are the same every time, and their ids."""
        generator = torch.Generator().manual_seed(0)
        self.model.eval()
        losses, ids = zip(*(self._losses(each, generator) for each in blocks.split(16)), strict=True)
        self.model.train()
        return torch.cat(losses).double().cpu(), torch.cat(ids)

    def _losses(self, blocks: Tensor, generator: torch.Generator) -> Losses:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bfloat16):
            return self.kind.loss(self.model, blocks, self.tokenizer, generator)

    def save(self, path: Path, asked: dict[str, Any]) -> None:
        """Write a checkpoint of the run that is described by ``asked``."""
        state = {
            "asked": asked,
            "progress": self.progress,
            "model": self.model.state_dict(),
            "optimizers": [each.state_dict() for each in self.optimizers],
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        with replacing(path) as temporary:
            temporary.write_bytes(hashlib.sha256(buffer.getbuffer()).digest() + buffer.getbuffer())

    def resume(self, path: Path, asked: dict[str, Any]) -> None:
        """Continue from a checkpoint, if there is one of the run described by ``asked``.

        Raises:
            ValueError: it is damaged, or has no checksum.
        """
        if not path.exists():
            return
        content = path.read_bytes()
        digest, saved = content[:32], memoryview(content)[32:]
        if hashlib.sha256(saved).digest() != digest:
            raise ValueError(f"{path} is damaged, or of an earlier version; delete it to start anew")
        state = torch.load(io.BytesIO(saved), map_location=self.device, weights_only=True)
        if state["asked"] != asked:
            return
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.progress = state["progress"]


def has_bfloat16(device: str) -> bool:
    """Whether products of bfloat16 are fast there: CUDA, or a CPU with instructions for them."""
    capabilities = torch.cpu.get_capabilities()
    return device == "cuda" or any(capabilities.get(each) for each in ("avx512_bf16", "amx_bf16", "bf16"))


def unigram_loss(counted: Tensor, targets: Tensor, vocabulary: int) -> float:
    """Return the mean loss of ``targets`` under the frequencies of the ids in ``counted``, each plus one."""
    counts = torch.bincount(counted.flatten(), minlength=vocabulary).double() + 1
    return float(-(counts / counts.sum()).log()[targets].mean())


def directory_of(name: str, ngrammer: str | None) -> str:
    """Return the name of a model's directory."""
    return name if ngrammer is None else f"{name}-ngrammer-{ngrammer}"


def train(name: str, root: Path, recipe: Recipe, *, device: str = "cpu", command: str = "") -> dict[str, Any]:
    """Train the model ``name`` on ``root/text``, write it to its directory in ``root`` and return its facts.

    An interrupted run leaves a ``.checkpoint`` beside it, which the next one with the same recipe and text
    continues: the weights are those of a run without interruption.

    Args:
        name: ``bert`` or ``gpt``.
        root: a directory with what `write_text` wrote in ``text``.
        recipe: of the run.
        device: ``cpu`` or ``cuda``.
        command: to be noted among the facts.
    """
    kind, text, directory = KINDS[name], root / "text", root / directory_of(name, recipe.ngrammer)
    checkpoint = root / f"{directory.name}.checkpoint"
    of_text = read_checked_json(text / "text.json")
    lines, valid_lines = (
        read_lines(text / f"{each}.txt", of_text[each].get("checksum")) for each in ("train", "valid")
    )
    tokenizer = kind.tokenizer(list(first_texts(lines, TOKENIZER_CHARS)), recipe.vocabulary)
    blocks = blocks_of(lines, tokenizer, kind, most=recipe.steps * recipe.batch)
    valid = blocks_of(valid_lines, tokenizer, kind)

    training = Training(kind, recipe, tokenizer, device)
    asked = {"recipe": dataclasses.asdict(recipe), "text": of_text}
    training.resume(checkpoint, asked)
    progress, every = training.progress, max(1, recipe.steps // CHECKPOINTS)
    begun = time.monotonic() - progress["seconds"], time.process_time() - progress["cpu_seconds"]
    with tqdm(
        total=recipe.steps, initial=progress["step"], desc=directory.name, unit="step", disable=None
    ) as bar:
        while progress["step"] < recipe.steps:
            training.advance(blocks)
            bar.update()
            if progress["step"] % every == 0 or progress["step"] == recipe.steps:
                loss = float(training.evaluate(valid)[0].mean())
                bar.set_postfix(valid=f"{loss:.3f}")
                progress["valid_losses"].append([progress["step"], round(loss, 4)])
                progress["seconds"] = round(time.monotonic() - begun[0], 1)
                progress["cpu_seconds"] = round(time.process_time() - begun[1], 1)
                training.save(checkpoint, asked)

    losses, ids = training.evaluate(valid)
    facts = {
        "model": name,
        "parameters": sum(each.numel() for each in training.model.parameters()),
        "valid_perplexity": round(float(losses.mean().exp()), 2),
        "unigram_perplexity": round(math.exp(unigram_loss(blocks, ids, len(tokenizer))), 2),
        "tokens": recipe.steps * recipe.batch * LENGTH,  # read in all
        "different_tokens": blocks.numel(),
        **progress,
        **asked,
        "command": command,
        "environment": _environment(device),
    }
    with replacing_directory(directory) as temporary:
        training.model.cpu().save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        facts["files"] = {path.name: file_checksum(path) for path in sorted(temporary.iterdir())}
        (temporary / "reference.json").write_text(to_checked_json(facts))
    checkpoint.unlink(missing_ok=True)
    return facts


def damaged(directory: Path) -> str | None:
    """Return what is wrong with a model that `train` wrote, None if every file is as it was."""
    try:
        for name, expected in read_checked_json(directory / "reference.json").get("files", {}).items():
            if (got := file_checksum(directory / name)) != expected:
                return f"{name} was changed (expected {expected}, got {got})"
    except (OSError, ValueError) as error:
        return str(error)
    return None


def _environment(device: str) -> dict[str, Any]:
    versions = {each: metadata.version(each) for each in ("torch", "transformers", "tokenizers")}
    return versions | {
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "bfloat16": has_bfloat16(device),
    }
