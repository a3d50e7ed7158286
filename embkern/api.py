"""The main job in one call: ``compress`` a model's embedding table, save it, and say what it cost."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._version import __version__
from .evaluate import compare_tables, embed_sentences, read_sentences, sentence_fidelity
from .evaluate.sentences import pooling_of
from .files import check_writable_directory, replacing_directory
from .frequencies import (
    COMPRESSION_STRENGTH,
    TokenCounts,
    count_tokens,
    expected_frequencies,
    vocabulary_prior,
)
from .json_file import read_checked_json, to_checked_json
from .layer import CompressedEmbedding
from .methods.base import check_table
from .recipe import LMHead, Recipe
from .report import REPORT_NAME, Report, model_card, public_name, tier_uses
from .tensor_file import disk_error
from .text import read_texts, reason_of

try:
    import transformers
    from transformers import AutoConfig, AutoModel, AutoTokenizer
except ImportError as error:
    raise ImportError(
        "embkern.compress needs transformers (pip install 'embkern[transformers]'); "
        "embkern.ops, embkern.methods and embkern.FactorizedEmbedding work without it"
    ) from error

from .model_table import find_table, input_embeddings, other_tables
from .transformers import check_config, check_installable, install, stored_table

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Source = str | os.PathLike  # of text

MANIFEST_NAME = "embkern_files.json"  # what --overwrite may replace
_TOKENIZER_FILES = ("tokenizer*.json", "vocab.*", "*.model", "spiece*", "merges.txt")
# What sentence-transformers keeps beside a model.
_SENTENCE_FILES = (
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_*_config.json",
    "[0-9]*_*/*",
)


def compress(
    model: PreTrainedModel | str | os.PathLike,
    *,
    ratio: float | None = None,
    rank: int | None = None,
    method: str | None = None,
    lm_head: LMHead | None = None,
    recipe: Recipe | None = None,
    counts: TokenCounts | Tensor | str | os.PathLike | None = None,
    count_text: Source | Sequence[Source] | None = None,
    text: str | os.PathLike | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    output: str | os.PathLike | None = None,
    overwrite: bool = False,
    progress: bool | None = None,
    checkpoint: str | os.PathLike | None = None,
    log: str | os.PathLike | None = None,
    **options: Any,
) -> Report:
    """Compress the token embeddings of a model: in place for a live one, or of a path or hub name.

    Args:
        model: a transformers model, a directory, or a name on the hub.
        ratio: bytes of the table as stored over bytes of everything that replaces it, at least 1.
        rank: r instead of a ratio, 1 to H, of methods that make factors.
        method: a name in ``embkern.methods.METHODS``.
        lm_head: of a tied head: ``factorized``, the default, decodes through the same table; ``dense`` keeps
            the original one for it, and the model gets larger. Untied heads stay as they are.
        recipe: all of the above and the options in one object, instead of them.
        counts: how often each token is read, for methods that weigh rows by it, and for the report's weighted
            error: a file of ``embkern count``, a ``TokenCounts``, or frequencies (V,) that are taken as they
            are. Counts of text are mixed with what the order of the vocabulary tells of rare tokens; without
            any, that is all there is.
        count_text: text to count as well: a file, directory or data set as ``embkern.text.read_texts`` takes
            it, or several.
        text: a text file, one sentence a line; the report then tells how the embeddings of its first 1000
            sentences changed.
        tokenizer: of a live model, for ``text`` and to name the worst rows; of a path it is loaded.
        output: directory to save to: model, tokenizer, report, model card. It appears whole or not at all.
        overwrite: replace ``output`` if it holds what embkern saved there and nothing else.
        progress: show a bar on stderr; None shows it on a terminal.
        checkpoint: file from which a killed run of the autoencoder goes on.
        log: file of JSON lines, one per epoch of the autoencoder.
        options: of the method, such as ``epochs=10``.

    Returns:
        The report; ``report.model`` is the compressed model.

    Raises:
        ValueError: an argument is wrong, or the model's embedding cannot be replaced; it names what.
        FileNotFoundError: the model, the text or the counts do not exist.
        FileExistsError: ``output`` exists and may not be replaced.
    """
    recipe = _recipe(recipe, method, ratio, rank, lm_head, options)
    run: dict[str, Any] = {}
    if recipe.method == "autoencoder":
        run = {"progress": progress, "checkpoint": checkpoint, "log": log}
    elif checkpoint is not None or log is not None:
        raise ValueError(f"checkpoint, log: expected with method 'autoencoder' only, got {recipe.method!r}")
    if output is not None:
        check_output(output, overwrite, source=model)
    sentences = None if text is None else read_sentences(text)
    source: str | None = None
    if isinstance(model, (str, os.PathLike)):
        source = os.fspath(model)
        model = load_model(source)
        tokenizer = tokenizer or load_tokenizer(source)
    if sentences is not None and tokenizer is None:
        raise ValueError("text: expected a tokenizer with it (the model has none)")

    table = find_table(model)
    weight = table.weight.detach()
    check_table(weight)
    check_installable(table, recipe)
    table_bytes, bytes_before, others = weight.nbytes, model_bytes(model), other_tables(model)
    frequencies, counted = token_frequencies(len(weight), counts, count_text, tokenizer, progress=progress)
    embed = before = None
    if sentences is not None:
        pooling = pooling_of(source)
        embed = functools.partial(embed_sentences, model, tokenizer, sentences, pooling=pooling)
        before = embed()

    started = time.perf_counter()
    compressed = recipe.factorize(weight, frequencies, **run)
    seconds = time.perf_counter() - started
    comparison = compare_tables(
        weight,
        compressed.to(weight.dtype),
        counts=frequencies,
        tokens=tokenizer and tokenizer.convert_ids_to_tokens,
    )
    del weight  # the dense table is freed in the swap
    install(model, table, compressed, recipe)

    report = Report(
        source=public_name(source or str(getattr(model.config, "_name_or_path", ""))) or type(model).__name__,
        architecture=type(model).__name__,
        recipe=recipe,
        num_embeddings=compressed.num_embeddings,
        embedding_dim=compressed.embedding_dim,
        rank=getattr(compressed, "rank", None),
        tiers=tier_uses(compressed),
        dtype=str(compressed.dtype).removeprefix("torch."),
        counts=counted,
        facts=compressed.facts,
        head=model.config.quantization_config.table.head,
        table_bytes=table_bytes,
        factors_bytes=compressed.nbytes,
        ratio=table_bytes / compressed.nbytes,
        model_bytes_before=bytes_before,
        model_bytes_after=model_bytes(model),
        table=comparison,
        sentences=sentence_fidelity(before, embed()) if embed and before is not None else None,
        other_tables=others,
        seconds=round(seconds, 3),
        versions={
            "embkern": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    )
    report._model = model
    if output is not None:
        save(model, output, source=source, tokenizer=tokenizer, report=report)
    return report


def _recipe(
    recipe: Recipe | None,
    method: str | None,
    ratio: float | None,
    rank: int | None,
    lm_head: LMHead | None,
    options: dict[str, Any],
) -> Recipe:
    fields = {"method": method, "ratio": ratio, "rank": rank, "lm_head": lm_head, "options": options or None}
    given = {name: value for name, value in fields.items() if value is not None}
    if recipe is None:
        return Recipe.parse(**given)
    if given:
        raise ValueError(f"recipe: expected either a recipe or {', '.join(given)}, got both")
    return recipe


def token_frequencies(
    num_embeddings: int,
    counts: TokenCounts | Tensor | str | os.PathLike | None,
    count_text: Source | Sequence[Source] | None,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    progress: bool | None = None,
) -> tuple[Tensor, str]:
    """Return how often each token is expected to be read, (V,) float64, and in words where that comes from.

    Raises:
        ValueError: the counts, the text or the tokenizer are of another model, or not usable.
        FileNotFoundError: a file does not exist.
    """
    if isinstance(counts, Tensor):
        if count_text is not None:
            raise ValueError("counts, count_text: expected frequencies or text to count, got both")
        wide = counts.detach().to("cpu", torch.float64)
        if counts.shape != (num_embeddings,) or not (
            torch.isfinite(wide).all() and wide.min() >= 0 < wide.sum()
        ):
            raise ValueError(
                f"counts: expected {num_embeddings} finite numbers, none negative and not all 0, "
                f"got shape {tuple(counts.shape)} with values from {wide.min()} to {wide.max()}"
            )
        return wide / wide.sum(), "as given"
    if isinstance(counts, (str, os.PathLike)):
        counts = TokenCounts.load(counts)
    if counts is not None and tokenizer is not None:
        counts.check_tokenizer(tokenizer)
    if count_text is not None:
        if tokenizer is None:
            raise ValueError("count_text: expected a tokenizer with it (the model has none)")
        sources = [count_text] if isinstance(count_text, (str, os.PathLike)) else count_text
        texts = itertools.chain.from_iterable(map(read_texts, sources))
        counted = count_tokens(texts, tokenizer, num_embeddings=num_embeddings, progress=progress)
        counts = counted if counts is None else counts + counted
    prior = vocabulary_prior(tokenizer, num_embeddings)
    order = "the order of the vocabulary" if tokenizer is not None else "the order of the ids (no tokenizer)"
    if counts is not None:
        order = f"{counts.tokens:,} tokens of {counts.texts:,} texts, and {order}"
    return expected_frequencies(counts, prior, strength=COMPRESSION_STRENGTH), order


def export_dense(directory: str | os.PathLike, output: str | os.PathLike, *, overwrite: bool = False) -> None:
    """Save a compressed model as an ordinary one, its table decoded, that loads without embkern.

    Raises:
        ValueError: the model is not compressed by embkern.
        FileExistsError: ``output`` exists and may not be replaced.
    """
    check_output(output, overwrite, source=directory)
    model = load_model(directory)
    if getattr(model, "hf_quantizer", None) is None:
        raise ValueError(f"model: expected one compressed by embkern, got a dense one: {directory}")
    save(model.dequantize(), output, source=os.fspath(directory), tokenizer=load_tokenizer(directory))


def load_model(name: str | os.PathLike) -> PreTrainedModel:
    """Load a model with its head, in the dtype it is stored in, dense or compressed.

    Raises:
        FileNotFoundError: it is neither a directory nor to be had from the hub.
        ValueError: the directory holds no loadable model (a damaged file, an unknown architecture).
    """
    if not Path(name).exists() and str(name).startswith((".", "/", "~")):
        raise FileNotFoundError(f"model: expected a directory or a name on the hub, found none at {name}")
    try:
        check_config(name)
        config = AutoConfig.from_pretrained(name)
        architecture = getattr(transformers, (config.architectures or [""])[0], AutoModel)
        model, info = architecture.from_pretrained(name, output_loading_info=True)
        _check_loaded(model, info["missing_keys"])
        return model
    except Exception as error:  # transformers and safetensors raise many kinds; all mean the same here
        raise not_loaded(name, error) from error


def not_loaded(name: str | os.PathLike, error: Exception) -> Exception:
    """Return what to raise where a library fails to load a model."""
    if Path(name).exists():
        return ValueError(f"model: {name} cannot be loaded: {reason_of(error)}")
    return FileNotFoundError(
        f"model: {str(name)!r} is neither a directory here nor to be had from the hub: {reason_of(error)}"
    )


def _check_loaded(model: PreTrainedModel, missing: set[str]) -> None:
    """Raise if the table, or a head that belongs to it, was not in the checkpoint and is random."""
    interesting = {id(input_embeddings(model)), id(model.get_output_embeddings())}
    names = [name for name, module in model.named_modules() if id(module) in interesting]
    lost = sorted(key for key in missing if key.rpartition(".")[0] in names)
    if lost:
        raise ValueError(f"the checkpoint does not hold {', '.join(lost)}")


def load_tokenizer(name: str | os.PathLike) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer beside a model; None if there is none.

    Raises:
        ValueError: its files are there and cannot be read.
    """
    if Path(name).is_dir() and not any(next(Path(name).glob(each), None) for each in _TOKENIZER_FILES):
        return None  # transformers would make up one of the model's class
    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # many kinds, see load_model
        if not Path(name).is_dir():
            return None
        raise ValueError(f"tokenizer: the one in {name} cannot be loaded: {error}") from error


def model_bytes(model: PreTrainedModel) -> int:
    """Bytes of all parameters, a shared one counted once, and of a compressed table, as a file holds them."""
    embedding = input_embeddings(model)
    if not isinstance(embedding, CompressedEmbedding):
        return sum(parameter.nbytes for parameter in model.parameters())
    own = {id(parameter) for parameter in embedding.parameters()}
    others = sum(parameter.nbytes for parameter in model.parameters() if id(parameter) not in own)
    return others + stored_table(model).nbytes


def check_output(output: str | os.PathLike, overwrite: bool, source: Any = None) -> None:
    """Raise unless ``output`` may be written: before any work is done, and so that nothing of value is lost.

    Raises:
        FileExistsError: it exists, and overwrite is not given, or it holds what embkern did not write.
        ValueError: it is the source, or the source is inside it.
        OSError: it cannot be written: no permission, or a mount point, which cannot be replaced.
    """
    path = Path(output).resolve()
    if isinstance(source, (str, os.PathLike)) and Path(source).exists():
        dense = Path(source).resolve()
        if path == dense or path in dense.parents:
            raise ValueError(
                f"output: {output} is, or holds, the model to read ({source}); choose another name"
            )
    if os.path.ismount(path):
        raise OSError(
            f"output: {path} is a mount point and cannot be replaced whole; name a directory inside it"
        )
    check_writable_directory(path.parent, "output")
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not overwrite:
        raise FileExistsError(f"output: {path} exists; choose another name, or pass overwrite (--overwrite)")
    foreign = _foreign_files(path)
    if foreign:
        raise FileExistsError(
            f"output: {path} holds what embkern did not write ({', '.join(foreign[:3])}); it is not replaced"
        )


def _foreign_files(directory: Path) -> list[str]:
    """Files in a directory that are not in the list ``save`` left there."""
    if not directory.is_dir():
        return [directory.name]
    known: set[str] = set()
    manifest = directory / MANIFEST_NAME
    if manifest.is_file():
        with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):
            known = set(json.loads(manifest.read_text(encoding="utf-8")))
    return sorted(_files(directory) - known - {MANIFEST_NAME})


def _files(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if not path.is_dir()}


def save(
    model: PreTrainedModel,
    output: str | os.PathLike,
    *,
    source: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    report: Report | None = None,
) -> None:
    """Save a model, its tokenizer, the report and a model card; the directory appears whole or not at all."""
    with replacing_directory(output) as directory:
        try:
            model.save_pretrained(directory)
            if tokenizer is not None:
                tokenizer.save_pretrained(directory)
        except Exception as error:  # a full disk is no OSError in safetensors, and an Exception in tokenizers
            if refused := disk_error(error):
                raise refused from error
            raise
        if source is not None:
            _copy_sentence_files(source, directory)
        if report is not None:
            (directory / REPORT_NAME).write_text(to_checked_json(report, indent=2), encoding="utf-8")
            (directory / "README.md").write_text(model_card(report), encoding="utf-8")
        manifest = json.dumps(sorted(_files(directory)), indent=1)
        (directory / MANIFEST_NAME).write_text(manifest + "\n", encoding="utf-8")


def _copy_sentence_files(source: str, directory: Path) -> None:
    """Keep a sentence encoder one: its pooling and normalisation live beside the transformer."""
    if not Path(source).is_dir():
        from huggingface_hub import snapshot_download

        source = snapshot_download(source, allow_patterns=list(_SENTENCE_FILES))
    for pattern in _SENTENCE_FILES:
        for path in sorted(Path(source).glob(pattern)):
            copy = directory / path.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            if path.is_file():
                shutil.copyfile(path, copy)


def read_report(directory: str | os.PathLike) -> Report | None:
    """Return the report beside a saved model, None if there is none; ValueError if it is damaged."""
    path = Path(directory) / REPORT_NAME
    if not path.is_file():
        return None
    content = read_checked_json(path)
    try:
        return Report.model_validate(content)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
