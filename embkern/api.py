"""Compress a model in one call, count tokens for it, and export it as a dense model."""

from __future__ import annotations

import functools
import itertools
import os
import time
from collections.abc import Iterable, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any

import torch

from ._version import __version__
from .fidelity import embed_sentences, read_sentences, sentence_fidelity
from .fidelity.sentences import is_sentence_encoder, pooling_of, pooling_within
from .io.atomic import new_file
from .methods.calibration import Calibration, CalibrationFacts, CalibrationSummary
from .methods.metric_allocation import input_frequencies
from .methods.sharded import World
from .models.calibrate import check_calibration
from .models.calibrate.choice import Choice, choose_calibration, load_calibration
from .models.calibrate.on_samples import self_calibrate_holding_out
from .models.calibrate.on_text import calibrate_holding_out
from .models.checkpoint import model_bytes
from .models.find_table import other_tables
from .models.fisher_file import load_fisher
from .models.held_out import held_out_divergence
from .models.loading import load_compressed, load_model, load_tokenizer, required_tokenizer
from .models.plan import (
    NOT_CALIBRATED,
    calibration_serves,
    check_unseen,
    plan_tables,
    token_rows,
    tokens_read,
)
from .models.quantizer import install
from .models.report import Report, TableReport, name_of, public_name
from .models.saving import check_output, save
from .models.static_embeddings import (
    decode_bag,
    encode_sentences,
    encoder_of,
    is_sentence_transformer,
    is_static,
    is_static_folder,
    load_static,
    tokenizer_of,
)
from .models.unseen_rows import check_keeps_unseen, keep_unseen_rows
from .recipe import LMHead, Recipe, Tables
from .text.counts import CountSummary, count_tokens
from .text.frequencies import Counts, Source, frequencies_of, gathered_counts, read_tokens
from .text.reading import read_texts
from .text.token_names import token_names

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def compress(
    model: PreTrainedModel | SentenceTransformer | str | os.PathLike,
    *,
    ratio: float | None = None,
    rank: int | None = None,
    method: str | None = None,
    lm_head: LMHead | None = None,
    tables: Tables | None = None,
    recipe: Recipe | None = None,
    counts: Counts | None = None,
    count_text: Source | Sequence[Source] | None = None,
    text: str | os.PathLike | None = None,
    calibration: Calibration | str | os.PathLike | None = None,
    calibrate_text: Source | Sequence[Source] | None = None,
    calibrate: bool | None = None,
    fisher: torch.Tensor | str | os.PathLike | None = None,
    tokenizer: PreTrainedTokenizerBase | str | os.PathLike | None = None,
    output: str | os.PathLike | None = None,
    keep_unseen: str | os.PathLike | None = None,
    overwrite: bool = False,
    progress: bool | None = None,
    checkpoint: str | os.PathLike | None = None,
    log: str | os.PathLike | None = None,
    world: World | None = None,
    **options: Any,
) -> Report:
    """Compress the token embeddings of a model.

    A model object is changed in place; a model that is given by name is loaded.

    Args:
        model: a model of transformers, a ``SentenceTransformer`` over one or over static embeddings, a
            directory, or a name on the hub.
        ratio: bytes of the table over bytes of everything that replaces it, as stored; at least 1.
        rank: r, 1 to H, instead of a ratio, for methods that make factors. ``prune`` needs neither.
        method: a name in ``embkern.methods.METHODS``.
        lm_head: ``factorized``, the default, lets a tied head share the compressed table; ``dense`` keeps the
            original table for it, which makes the model larger. Untied heads do not change.
        tables: names or patterns of the tables to compress, by default the input table and what is tied to
            it: of any ``nn.Embedding`` (``"embed_tokens_per_layer"``, ``"*.wpe"``), ``"input"`` for the input
            table, ``"output"`` or its name for an untied output head, which becomes a packed linear layer. A
            mapping gives some of them a ratio of their own: ``{"input": 16, "output": 8}``.
        recipe: an object with all of the above and the options, instead of them.
        counts: token frequencies for methods that weight rows and for the report's weighted error: a file of
            ``embkern count``, a ``TokenCounts``, a mapping of ids or tokens to integers, or frequencies (V,),
            which are used as they are. Counts of text are mixed with an estimate from the order of the
            vocabulary (``vocabulary_prior``); without counts, that estimate is used.
        count_text: text to count in addition: a file, directory or data set as ``embkern.text.read_texts``
            takes it, or several.
        text: a text file, one sentence per line; the report then compares the embeddings of its first 1000
            sentences.
        calibration: what the model's output depends on, from ``embkern.calibrate`` or a file of
            ``embkern calibrate``; for ``allocate``. It or ``calibrate_text`` replaces that of the recipe.
        calibrate_text: text to calibrate on instead, as ``count_text``.
        calibrate: without these two, whether to calibrate on samples of the model itself. None does so for
            causal language models, unless it would take more than ten minutes; False changes nothing.
        fisher: weights (V, H) of the input table for methods that take them, or a file of ``embkern fisher``.
        tokenizer: the tokenizer of a model object, or its directory or name, for texts and the names of the
            worst rows; that of a model given by name is loaded.
        output: directory to save to: model, tokenizer, report and model card. It is complete or does not
            exist.
        keep_unseen: file for the dense rows that ``prune``, or ``allocate`` with ``unseen``, does not store;
            ``embkern.restore`` puts them back.
        overwrite: whether to replace ``output`` if all of its files were written by embkern, and
            ``keep_unseen``.
        progress: whether to show a progress bar on stderr; None shows it on a terminal.
        checkpoint: file from which a killed run of the autoencoder is resumed.
        log: file of JSON lines, one per epoch of the autoencoder.
        world: the processes of a distributed run, which divide the rows of each table (see
            ``embkern.methods.sharded``): all call this with the same arguments and get the same model. The
            first one calibrates and writes files.
        options: options of the method, such as ``epochs=10``.

    Returns:
        The report; ``report.model`` is the compressed model. Its sizes are those of all compressed tables
        together, the comparison that of the first; ``report.tables`` has each of several tables.

    Raises:
        ValueError: an argument is wrong, or the model's embedding cannot be replaced; the message names it.
        FileNotFoundError: the model, the text or the counts do not exist.
        FileExistsError: ``output`` or ``keep_unseen`` exists and may not be replaced.
        OSError: ``output`` or ``keep_unseen`` cannot be written.
    """
    recipe = Recipe.of_arguments(
        recipe, method=method, ratio=ratio, rank=rank, lm_head=lm_head, calibrate=calibrate, tables=tables,
        options=options or None,
    )  # fmt: skip
    run: dict[str, Any] = {}
    if recipe.method == "autoencoder":
        run = {"progress": progress, "checkpoint": checkpoint, "log": log}
    elif checkpoint is not None or log is not None:
        raise ValueError(f"checkpoint, log: expected with method 'autoencoder' only, got {recipe.method!r}")
    if world is not None:
        recipe.check_distributed()
        run["world"] = world
    world = world or World()
    if fisher is not None:
        recipe.check_fisher()
        run["fisher"] = fisher if isinstance(fisher, torch.Tensor) else load_fisher(fisher)
    if output is not None:
        world.on_first(functools.partial(check_output, output, overwrite, source=model))
    sentences = None if text is None else read_sentences(text)
    source: str | None = None
    if isinstance(tokenizer, (str, os.PathLike)):
        name, tokenizer = tokenizer, load_tokenizer(tokenizer)
        if tokenizer is None:
            raise FileNotFoundError(f"tokenizer: expected a directory or name with one, found none at {name}")
    if isinstance(model, (str, os.PathLike)):
        source = os.fspath(model)
        if is_static_folder(source):
            model = load_static(source)
        else:
            model, tokenizer = load_model(source), tokenizer or load_tokenizer(source)
    whole = model  # what is saved and returned
    if is_static(model):
        tokenizer = tokenizer or tokenizer_of(model)
    elif is_sentence_transformer(model):
        model, tokenizer = encoder_of(model), tokenizer or model.tokenizer
    if sentences is not None and tokenizer is None:
        raise ValueError("text: expected a tokenizer with it (the model has none)")

    plans = plan_tables(model, recipe)
    if keep_unseen is not None:
        check = functools.partial(check_keeps_unseen, keep_unseen, recipe, plans, overwrite)
        world.on_first(check)
    bytes_before = model_bytes(model)
    V = token_rows(model, plans)
    known_counts = gathered_counts(V, counts, count_text, tokenizer, progress=progress)
    chosen = Choice(phrase=NOT_CALIBRATED if recipe.calibrated else None)
    given = any(each is not None for each in (calibration, calibrate_text, recipe.calibration))
    check_unseen(plans, known=given or known_counts is not None)
    if calibration_serves(plans, asked=given or bool(recipe.calibrate)):
        choose = functools.partial(
            choose_calibration, model, recipe, calibration=calibration, text=calibrate_text,
            tokenizer=tokenizer, progress=progress, hold_out=[plan.table.role for plan in plans] == ["input"],
            pooling=functools.partial(pooling_within, whole) if is_sentence_transformer(whole) else None,
        )  # fmt: skip
        chosen = world.on_first(choose)
    calibration = chosen.calibration
    seen = known_counts
    if seen is None and calibration is not None and calibration.on_text:
        seen = calibration.inputs
    read = tokens_read(read_tokens(seen, V, tokenizer), calibration, model)
    if calibration is not None and known_counts is None:
        frequencies, counted = input_frequencies(calibration), "those of the calibration"
    else:
        by_class = calibration is not None  # without one, tables keep the bits that they had
        frequencies, counted = frequencies_of(known_counts, V, tokenizer, by_class=by_class)
    embed = before = None
    if sentences is not None:
        if is_sentence_transformer(whole):
            embed = functools.partial(encode_sentences, whole, sentences)
        else:
            pooling = pooling_of(source)
            embed = functools.partial(embed_sentences, model, tokenizer, sentences, pooling=pooling)
        before = embed()

    reports, divergence = [], None
    for plan in plans:
        known = plan.knowledge(frequencies, calibration, read)
        started = time.perf_counter()
        compressed = plan.compress(known, **run)
        seconds = time.perf_counter() - started
        tokens = functools.partial(token_names, tokenizer) if tokenizer and plan.of_tokens else None
        measured = TableReport.of(
            plan,
            compressed,
            known,
            tokens,
            counts=counted if plan.of_tokens else "all rows weigh alike",
            calibration=chosen.phrase if known.calibration or calibration is None else NOT_CALIBRATED,
            seconds=round(seconds, 3),
        )
        reports.append(measured)
        if chosen.held_out is not None:
            head = recipe.compresses_head(plan.table.tied)
            divergence = held_out_divergence(model, plan.table, compressed, chosen.held_out, head=head)
        apart = None
        if keep_unseen is not None:
            keep = functools.partial(keep_unseen_rows, keep_unseen, plan.table, compressed)
            apart = world.on_first(keep)
        install(model, plan.table, compressed, recipe, source=apart)  # frees the dense table
        del compressed
    report = Report.of_tables(
        reports,
        source=public_name(source or name_of(model)) or type(model).__name__,
        architecture=type(model).__name__,
        recipe=recipe,
        divergence=divergence,
        model_bytes_before=bytes_before,
        model_bytes_after=model_bytes(model),
        sentences=sentence_fidelity(before, embed()) if embed and before is not None else None,
        other_tables=other_tables(model),
        versions={
            "embkern": __version__,
            "torch": torch.__version__,
            "transformers": metadata.version("transformers"),
        },
    )
    report._model = whole
    if output is not None:
        if is_sentence_transformer(whole):
            saved = functools.partial(save, whole, output, report=report)
        else:
            saved = functools.partial(save, model, output, source=source, tokenizer=tokenizer, report=report)
        world.on_first(saved)
    return report


def export_dense(directory: str | os.PathLike, output: str | os.PathLike, *, overwrite: bool = False) -> None:
    """Decode a compressed model's table and save the model so that it loads without embkern.

    Args:
        directory: the compressed model.
        output: directory to save to. It is complete or does not exist.
        overwrite: whether to replace ``output`` if all of its files were written by embkern.

    Raises:
        FileNotFoundError: the model does not exist.
        ValueError: the model is not compressed by embkern.
        FileExistsError: ``output`` exists and may not be replaced.
        OSError: ``output`` cannot be written.
    """
    check_output(output, overwrite, source=directory)
    if is_static_folder(directory):
        save(decode_bag(load_static(directory)), output)
        return
    model = load_compressed(directory)
    save(model.dequantize(), output, source=os.fspath(directory), tokenizer=load_tokenizer(directory))


def count_files(
    model: str | os.PathLike,
    sources: Iterable[str | os.PathLike],
    output: str | os.PathLike,
    *,
    errors: str = "strict",
    overwrite: bool = False,
    progress: bool | None = None,
) -> CountSummary:
    """Count the tokens of texts with a model's tokenizer, and save the counts.

    Args:
        model: a directory with a tokenizer, or a name on the hub.
        sources: sources of text, as ``read_texts`` takes them.
        output: file to write, with ``TokenCounts.save``.
        errors: what to do with bytes that are not UTF-8 text: ``strict`` raises, ``replace`` reads U+FFFD.
        overwrite: whether to replace an existing file.
        progress: whether to show a progress bar on stderr; None shows it on a terminal.

    Raises:
        ValueError: a source is not text or has none, or the tokenizer is damaged; the message names it.
        FileNotFoundError: the tokenizer, a source, or the directory of ``output`` does not exist.
        FileExistsError: ``output`` exists and ``overwrite`` is False, or it is one of the sources.
        OSError: ``output`` cannot be written.
    """
    sources = list(sources)
    path, tokenizer = new_file(output, overwrite, sources=sources), required_tokenizer(model)
    texts = itertools.chain.from_iterable(read_texts(source, errors=errors) for source in sources)
    counts = count_tokens(texts, tokenizer, progress=progress)
    counts.save(path)
    return counts.summary(tokenizer)


def calibrate_files(
    model: str | os.PathLike,
    sources: Iterable[str | os.PathLike],
    output: str | os.PathLike,
    *,
    own_samples: bool = False,
    add: Iterable[str | os.PathLike] = (),
    tokens: int | None = None,
    length: int = 256,
    seed: int = 0,
    errors: str = "strict",
    overwrite: bool = False,
    progress: bool | None = None,
) -> CalibrationSummary:
    """Calibrate a model on texts or on samples of its own, and save the calibration.

    An interrupted run leaves its sums in ``output`` with ``.partial`` appended, from which the same call
    resumes.

    Args:
        model: a directory, or a name on the hub.
        sources: sources of text, as ``read_texts`` takes them.
        output: file to write, with ``Calibration.save``.
        own_samples: whether to calibrate a language model on its own samples instead of text.
        add: calibrations of the same model to add, alone or with one on text or samples.
        tokens: number of tokens; None takes 16384 of text, or 8192 of samples.
        length: longest input in tokens.
        seed: random seed of labels, masks and samples.
        errors: what to do with bytes that are not UTF-8 text: ``strict`` raises, ``replace`` reads U+FFFD.
        overwrite: whether to replace an existing file.
        progress: whether to show a progress bar on stderr; None shows it on a terminal.

    Raises:
        ValueError: a source is not text or has too little, the model or its tokenizer is damaged or cannot be
            calibrated, or a calibration to add is another model's; the message names it.
        FileNotFoundError: the model, its tokenizer, a source, or the directory of ``output`` does not exist.
        FileExistsError: ``output`` exists and ``overwrite`` is False, or it is one of the sources.
        OSError: ``output`` cannot be written.
    """
    sources, parts = list(sources), list(add)
    if own_samples and sources:
        raise ValueError("text: expected none with samples of the model itself, got both")
    if not (own_samples or sources or parts):
        raise ValueError("text: expected a source of text, samples of the model (--self), or files to add")
    path = new_file(output, overwrite, sources=sources)
    found: list[Calibration] = [load_calibration(each, "add") for each in parts]
    tokenizer = required_tokenizer(model) if sources else load_tokenizer(model)
    loaded = load_model(model)
    for each in found:
        check_calibration(each, loaded, tokenizer)

    def check(facts: CalibrationFacts) -> None:
        for each in found:
            each.check_addable(facts)

    settings: dict[str, Any] = {
        "length": length, "seed": seed, "progress": progress, "checkpoint": f"{path}.partial", "check": check
    }  # fmt: skip
    if sources:
        texts = itertools.chain.from_iterable(read_texts(source, errors=errors) for source in sources)
        tokens = 16384 if tokens is None else tokens
        pooling = pooling_of(model) if is_sentence_encoder(model) else None
        made, _ = calibrate_holding_out(
            loaded, tokenizer, texts, 0, tokens=tokens, pooling=pooling, **settings
        )
        found.append(made)
    elif own_samples:
        windows = -(-(8192 if tokens is None else tokens) // max(1, length))
        made, _ = self_calibrate_holding_out(
            loaded, 0, windows=windows, tokenizer=tokenizer, limit_seconds=None, **settings
        )
        found.append(made)
    total = sum(found[1:], found[0])
    total.save(path)
    return total.summary()
