"""Two small language models with tied heads, trained from scratch on text of this installation.

    python -m benchmarks reference_models [--models bert gpt] [--minutes 8]

`bert` is a masked model with a WordPiece tokenizer, `gpt` a causal one with byte-level BPE. They land in
`cache_directory()/reference/{bert,gpt}` as transformers directories, each with its facts in `reference.json`,
beside the text they share: `text/{train,valid,test}.txt`, a paragraph a line, no document in two of them.

A run is bounded by steps: the same text, seed, steps, threads and machine give the same weights, and
`--minutes` only sets the number of steps, by what two cores did. An interrupted run continues from its last
checkpoint. On a GPU the batch is eight times as large.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import io
import json
import math
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from embkern.io.atomic import file_checksum, replacing, replacing_directory
from embkern.io.cache import cache_directory
from embkern.io.checked_json import read_checked_json, to_checked_json

from .installed_text import Document, installed_documents, split

VOCABULARY = 8192
LENGTH = 128  # tokens of a block, and the most that the models take
HELD_OUT_CHARS, TRAIN_CHARS = 160_000, 40_000_000
TOKENIZER_CHARS = 12_000_000  # of the train text, for the tokenizers
MASKED, AS_MASK, AS_RANDOM = 0.15, 0.8, 0.1  # BERT's own shares: of tokens, and of the masked ones
MASKED_IN_TRAINING = 0.25  # of tokens: more to learn from in a step
MINUTES = 8.0
CHECKPOINTS = 10  # in a whole run
ALPHABET = 1000  # characters of WordPiece at most; rarer ones are unknown
BERT_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
END_OF_TEXT = "<|endoftext|>"  # GPT-2's


Losses = tuple[Tensor, Tensor]  # of some tokens, and the ids of these tokens


@dataclass(frozen=True)
class Recipe:
    """What decides the weights, beside the text and the machine."""

    steps: int
    batch: int = 16  # blocks
    layers: int = 4
    width: int = 256
    vocabulary: int = VOCABULARY
    learning_rate: float = 2e-3
    warmup: float = 0.06  # of the steps; the rate then falls to zero in a straight line
    weight_decay: float = 0.1
    seed: int = 0


# ---------------------------------------------------------------------------------------------------------
# The two kinds


def bert_tokenizer(texts: Sequence[str], vocabulary: int) -> Any:
    """Train a lower-case WordPiece tokenizer."""
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertTokenizer

    trained = BertWordPieceTokenizer(lowercase=True)
    counts = Counter(character for text in texts for character in trained.normalize(text))
    letters = sorted(counts, key=lambda each: (-counts[each], each))[: min(ALPHABET, vocabulary // 4)]
    trained.train_from_iterator(
        texts,
        vocab_size=vocabulary,
        initial_alphabet=letters,
        limit_alphabet=len(letters),
        # The trainer numbers the pieces within words in an order that differs between runs, and numbers
        # decide ties; what is special it numbers first, as given. Only names go on to the tokenizer below.
        special_tokens=[*BERT_SPECIAL, *(f"##{letter}" for letter in letters if not letter.isspace())],
        show_progress=False,
    )
    return BertTokenizer(vocab=trained.get_vocab(), do_lower_case=True, model_max_length=LENGTH)


def gpt_tokenizer(texts: Sequence[str], vocabulary: int) -> Any:
    """Train a byte-level BPE tokenizer; one special token is its begin, end and padding."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2Tokenizer

    trained, special = ByteLevelBPETokenizer(), [END_OF_TEXT]
    trained.train_from_iterator(texts, vocab_size=vocabulary, special_tokens=special, show_progress=False)
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    return GPT2Tokenizer(vocab=model["vocab"], merges=merges, pad_token=END_OF_TEXT, model_max_length=LENGTH)


def bert_model(recipe: Recipe, tokenizer: Any) -> nn.Module:
    """Return an untrained BERT with a tied masked-language-model head."""
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=recipe.width,
            num_hidden_layers=recipe.layers,
            num_attention_heads=max(1, recipe.width // 64),
            intermediate_size=4 * recipe.width,
            max_position_embeddings=LENGTH,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def gpt_model(recipe: Recipe, tokenizer: Any) -> nn.Module:
    """Return an untrained GPT-2 with a tied head."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_embd=recipe.width,
            n_layer=recipe.layers,
            n_head=max(1, recipe.width // 64),
            n_positions=LENGTH,
            activation_function="gelu_pytorch_tanh",  # GPT-2's own formula, in one kernel
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            resid_pdrop=0.0,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def bert_loss(model: Any, blocks: Tensor, tokenizer: Any, generator: torch.Generator) -> Losses:
    """Return the loss of every masked token, and their ids."""
    special = torch.tensor(tokenizer.all_special_ids)
    draw = torch.rand(blocks.shape, generator=generator)
    share = MASKED_IN_TRAINING if model.training else MASKED
    masked = (draw < share) & ~torch.isin(blocks, special)
    inputs = blocks.masked_fill(masked & (draw < share * AS_MASK), tokenizer.mask_token_id)
    random = torch.randint(len(tokenizer), blocks.shape, generator=generator)
    inputs = torch.where(masked & (draw > share * (1 - AS_RANDOM)), random, inputs)
    device = next(model.parameters()).device
    hidden = model.bert(inputs.to(device)).last_hidden_state[masked.to(device)]
    targets = blocks[masked]
    return F.cross_entropy(model.cls(hidden).float(), targets.to(device), reduction="none"), targets


def gpt_loss(model: Any, blocks: Tensor, tokenizer: Any, generator: torch.Generator) -> Losses:
    """Return the loss of every token but the first of a block, and their ids; draws nothing."""
    device = next(model.parameters()).device
    hidden = model.transformer(blocks.to(device), use_cache=False).last_hidden_state[:, :-1]
    targets = blocks[:, 1:].flatten()
    logits = model.lm_head(hidden.flatten(0, 1)).float()
    return F.cross_entropy(logits, targets.to(device), reduction="none"), targets


@dataclass(frozen=True)
class Kind:
    """What differs between a masked and a causal model."""

    tokenizer: Callable[[Sequence[str], int], Any]  # of texts and the size of the vocabulary
    model: Callable[[Recipe, Any], nn.Module]
    loss: Callable[[Any, Tensor, Any, torch.Generator], Losses]
    before_block: str  # special tokens
    before_text: str
    after_text: str
    steps: int  # in MINUTES on two cores with instructions for bfloat16, about


KINDS = {
    "bert": Kind(bert_tokenizer, bert_model, bert_loss, "[CLS]", "", "[SEP]", 1300),
    "gpt": Kind(gpt_tokenizer, gpt_model, gpt_loss, "", END_OF_TEXT, "", 910),
}


# ---------------------------------------------------------------------------------------------------------
# Text


def write_text(directory: Path, documents: Iterable[Document] | None = None, **sizes: int) -> None:
    """Write ``{train,valid,test}.txt`` and ``text.json``, of the installed documents by default.

    ``sizes`` are those of `split`.
    """
    sizes = {"held_out_chars": HELD_OUT_CHARS, "train_chars": TRAIN_CHARS} | sizes
    splits = split(installed_documents() if documents is None else documents, **sizes)
    facts: dict[str, Any] = {"characters_by_source": dict(splits.sources.most_common())}
    with replacing_directory(directory) as temporary:
        for name, texts in splits.named().items():
            path = temporary / f"{name}.txt"
            path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
            facts[name] = {
                "texts": len(texts), "bytes": path.stat().st_size, "checksum": file_checksum(path)
            }  # fmt: skip
        (temporary / "text.json").write_text(to_checked_json(facts))


def read_lines(path: Path, checksum: str | None = None) -> list[str]:
    """Return the texts of a file of one text a line.

    Raises:
        ValueError: its checksum is another.
    """
    if checksum is not None and (got := file_checksum(path)) != checksum:
        raise ValueError(f"{path} is damaged or edited: expected checksum {checksum}, got {got}")
    return path.read_text(encoding="utf-8").split("\n")[:-1]


def blocks_of(texts: Sequence[str], tokenizer: Any, kind: Kind, most: int | None = None) -> Tensor:
    """Pack texts in their order into rows of ``LENGTH`` ids, ``most`` rows at most; the rest is dropped."""
    first, before, after = (
        tokenizer.convert_tokens_to_ids([each] if each else [])
        for each in (kind.before_block, kind.before_text, kind.after_text)
    )
    size, stream = LENGTH - len(first), list[int]()
    for start in range(0, len(texts), 1000):
        if most is not None and len(stream) >= most * size:
            break
        batch = tokenizer(texts[start : start + 1000], add_special_tokens=False, verbose=False)
        for ids in batch["input_ids"]:
            stream += [*before, *ids, *after]
    if len(stream) < size:
        raise ValueError(f"texts: expected at least {size} tokens, got {len(stream)}")
    body = torch.tensor(stream[: len(stream) // size * size]).view(-1, size)[:most]
    return torch.cat([torch.tensor(first, dtype=torch.long).expand(len(body), -1), body], 1)


# ---------------------------------------------------------------------------------------------------------
# Training


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
    """A model on its way: what a checkpoint holds, and one step of it."""

    def __init__(self, kind: Kind, recipe: Recipe, tokenizer: Any, device: str) -> None:
        self.kind, self.recipe, self.tokenizer, self.device = kind, recipe, tokenizer, device
        self.bfloat16 = has_bfloat16(device)
        torch.manual_seed(recipe.seed)
        self.model: Any = kind.model(recipe, tokenizer).to(device).train()
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
        """Write a checkpoint of what is asked for."""
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
        """Continue from a checkpoint, if there is one of what is asked for.

        Raises:
            ValueError: it is damaged, or from before there were checksums.
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


def train(name: str, root: Path, recipe: Recipe, *, device: str = "cpu", command: str = "") -> dict[str, Any]:
    """Train the model ``name`` on ``root/text``, write it to ``root/name`` and return its facts.

    An interrupted run leaves ``root/name.checkpoint``, which the next one with the same recipe and text
    continues: the weights are those of a run without interruption.

    Args:
        name: ``bert`` or ``gpt``.
        root: a directory with what `write_text` wrote in ``text``.
        recipe: of the run.
        device: ``cpu`` or ``cuda``.
        command: to be noted among the facts.
    """
    kind, text, checkpoint = KINDS[name], root / "text", root / f"{name}.checkpoint"
    of_text = read_checked_json(text / "text.json")
    lines, valid_lines = (
        read_lines(text / f"{each}.txt", of_text[each].get("checksum")) for each in ("train", "valid")
    )
    tokenizer = kind.tokenizer(list(_head(lines, TOKENIZER_CHARS)), recipe.vocabulary)
    blocks = blocks_of(lines, tokenizer, kind, most=recipe.steps * recipe.batch)
    valid = blocks_of(valid_lines, tokenizer, kind)

    training = Training(kind, recipe, tokenizer, device)
    asked = {"recipe": dataclasses.asdict(recipe), "text": of_text}
    training.resume(checkpoint, asked)
    progress, every = training.progress, max(1, recipe.steps // CHECKPOINTS)
    begun = time.monotonic() - progress["seconds"], time.process_time() - progress["cpu_seconds"]
    with tqdm(total=recipe.steps, initial=progress["step"], desc=name, unit="step", disable=None) as bar:
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
    with replacing_directory(root / name) as temporary:
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


def _head(texts: Sequence[str], most: int) -> Iterator[str]:
    for text in texts:
        if most <= 0:
            return
        yield text
        most -= len(text)


def _environment(device: str) -> dict[str, Any]:
    versions = {each: metadata.version(each) for each in ("torch", "transformers", "tokenizers")}
    return versions | {
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "bfloat16": has_bfloat16(device),
    }


def main(arguments: list[str]) -> None:
    """Train the models that are not in the cache."""
    options = _parse(arguments)
    root = (options.cache or cache_directory()) / "reference"
    wanted = [name for name in options.models if options.overwrite or not (root / name).exists()]
    for name in options.models:
        if name not in wanted:
            print(f"{name}: is in {root / name} already (--overwrite trains it again)")
            if reason := damaged(root / name):
                raise ValueError(f"{root / name} is damaged: {reason}; --overwrite trains it again")
    if wanted and not (root / "text").exists():
        print("collecting text of this installation: a minute or two", flush=True)
        write_text(root / "text")
    command = " ".join(["python -m benchmarks reference_models", *arguments])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in wanted:
        steps = options.steps or max(1, round(KINDS[name].steps * options.minutes / MINUTES))
        recipe = Recipe(steps, batch=128 if device == "cuda" else 16, seed=options.seed)
        minutes = steps / KINDS[name].steps * MINUTES
        print(f"{name}: {steps} steps, about {minutes:.1f} minutes on two cores", flush=True)
        facts = train(name, root, recipe, device=device, command=command)
        perplexity = f"{facts['valid_perplexity']} (unigram {facts['unigram_perplexity']})"
        size = f"{facts['parameters']:,} parameters"
        print(
            f"{name}: validation perplexity {perplexity}, {size}, {facts['seconds']:.0f} s -> {root / name}"
        )


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks reference_models",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--models", nargs="+", choices=list(KINDS), default=list(KINDS))
    add("--minutes", type=float, default=MINUTES, help="about, per model on two cores: sets the steps")
    add("--steps", type=int, help="per model, instead of --minutes")
    add("--seed", type=int, default=0)
    add("--cache", type=Path, help="directory; default: embkern's cache")
    add("--overwrite", action="store_true", help="train again, on the same text unless that is removed")
    return parser.parse_args(arguments)
