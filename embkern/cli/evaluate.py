"""The commands of ``embkern evaluate``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from .console import AsJson, ManyValues, Model, Text, console, print_comparison, print_json

if TYPE_CHECKING:
    from ..evaluate.cells import FineTuned
    from ..evaluate.harness import HarnessRun
    from ..evaluate.tasks import Task

app = typer.Typer(no_args_is_help=True, help="Measure the quality of a compressed model.")


@app.command()
def table(
    directory: Annotated[str, typer.Argument(help="a compressed model", metavar="DIR")],
    against: Annotated[str, typer.Option(help="the dense model that was compressed")],
    text: Text = None,
    as_json: AsJson = False,
) -> None:
    """Compare a compressed model with the dense one: rows, nearest neighbours, sentence embeddings."""
    from .. import inspection

    result = inspection.evaluate(directory, against, text=text)
    if as_json:
        print_json(result)
        return
    print_comparison(result, f"{directory} against {against}")


@app.command()
def perplexity(
    models: Annotated[
        list[str],
        typer.Argument(
            help="a masked or causal language model, dense or compressed; with --against, compressed ones",
            metavar="MODEL_OR_DIR...",
        ),
    ],
    dataset: Annotated[
        str, typer.Option(help="text: a file, a directory, or name:config:split:column of a data set")
    ],
    against: Annotated[
        str | None,
        typer.Option(help="the dense model; compressed tables are then measured in its input and tied head"),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(help="without --against: the dense model, from whose predictions the divergence is"),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="masked: random seed of the masks (default: 0)")] = None,
    masking: Annotated[
        str | None,
        typer.Option(help="masked: 80-10-10 (default: mask, random token, unchanged) or mask alone"),
    ] = None,
    mask_probability: Annotated[
        float | None, typer.Option(help="masked: share of masked tokens (default: 0.15)")
    ] = None,
    line_filter: Annotated[
        str | None, typer.Option(help="masked: authors removes '=', then texts below 20 tokens")
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(help="tokens per window (default: the model's, at most 512 (masked) or 1024)"),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(help="causal: tokens from one window to the next (default: half of max-length)"),
    ] = None,
    separator: Annotated[
        str | None, typer.Option(help="causal: newline between texts (default), or eos after each")
    ] = None,
    beginning: Annotated[
        str | None,
        typer.Option(help="causal: BOS begins the text (default), or every window; where texts have one"),
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="number of tokens to read of the text")] = None,
    batch_size: Annotated[int | None, typer.Option(help="windows per batch (default: 8)")] = None,
    device: Annotated[str | None, typer.Option(help="device such as cuda; the CPU by default")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="dtype such as bfloat16; that of the weights by default")
    ] = None,
    errors: Annotated[
        str, typer.Option(help="bytes that are not UTF-8 text: strict (an error) or replace")
    ] = "strict",
    as_json: AsJson = False,
) -> None:
    """Measure zero-shot perplexity: of one model, or of a dense model and those compressed from it.

    With --against or --reference also the KL divergence from the dense model's predictions: its mean over
    the scored tokens, its 99th percentile, and how often both find the same token likeliest.
    """
    from ..evaluate.against import measure_perplexity

    flags: dict[str, Any] = {
        "seed": seed, "masking": masking, "mask_probability": mask_probability, "line_filter": line_filter,
        "max_length": max_length, "stride": stride, "separator": separator, "beginning": beginning,
        "max_tokens": max_tokens, "batch_size": batch_size,
    }  # fmt: skip
    run = measure_perplexity(
        models, dataset, against=against, reference=reference, device=device, dtype=dtype, errors=errors,
        command=_command(),
        **{name: value for name, value in flags.items() if value is not None},
    )  # fmt: skip
    if as_json:
        print_json(run)
        return
    shown = Table("model", "bytes of the table", *run.columns, title=escape(f"perplexity on {dataset}"))
    for row in run.rows():
        shown.add_row(*map(escape, row))
    console().print(shown)
    typer.echo(f"{run.model.kind} language model, {run.model.tokens:,} of {run.read:,} tokens scored")


# ---- fine-tuning -----------------------------------------------------------------------------------------

Study = Annotated[
    Path, typer.Option("--output", "-o", help="directory of the study, which keeps finished runs")
]
Methods = Annotated[
    list[str] | None, typer.Option(help="default: dense svd autoencoder allocate", metavar="NAME...")
]
Ratio = Annotated[float, typer.Option(help="bytes of the table over bytes of what replaces it")]
Seeds = Annotated[
    list[int] | None,
    typer.Option(help="random seeds; several give mean and spread (default: 22)", metavar="N..."),
]
FreezeRule = Annotated[
    str,
    typer.Option(
        help="part of the token embeddings that is not trained, with any method: none, codes (the tensors "
        "with a row per token; basis and offset are trained) or table (all)"
    ),
]
Data = Annotated[
    Path | None,
    typer.Option(help="directory of train and validation .jsonl, .csv or .parquet (default: the hub's)"),
]
Counts = Annotated[Path | None, typer.Option(help="token frequencies: a file that `embkern count` wrote")]
CountText = Annotated[
    str | None, typer.Option(help="text to count token frequencies in: file, directory or data set")
]
Epochs = Annotated[float | None, typer.Option(help="epochs of training (default: 3)")]
LearningRate = Annotated[
    float | None, typer.Option("--lr", help="initial learning rate, which decreases linearly to 0")
]
BatchSize = Annotated[
    int | None, typer.Option(help="records per step, over all devices and accumulated batches")
]
Accumulation = Annotated[
    int | None, typer.Option(help="number of batches whose gradients a step accumulates, to save memory")
]
MaxLength = Annotated[int | None, typer.Option(help="tokens per input of the model")]
Precision = Annotated[
    str | None, typer.Option(help="precision of matrix products: fp32 (default), bf16 or fp16")
]
MaxTrain = Annotated[int | None, typer.Option(help="train on this many records only, for a trial")]
MaxEval = Annotated[int | None, typer.Option(help="score this many records only, for a trial")]
EvalBatchSize = Annotated[int, typer.Option(help="records per batch of scoring")]
SaveSteps = Annotated[int, typer.Option(help="steps between two checkpoints")]
KeepModels = Annotated[bool, typer.Option("--keep-models", help="save the model of every run")]
RunAgain = Annotated[bool, typer.Option("--overwrite", help="repeat finished runs")]


@app.command(cls=ManyValues)
def glue(
    model: Model,
    output: Study,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--tasks", "--task", help="default: cola sst2 mrpc stsb qqp mnli qnli rte wnli", metavar="NAME..."
        ),
    ] = None,
    methods: Methods = None,
    ratio: Ratio = 5.0,
    seeds: Seeds = None,
    freeze: FreezeRule = "codes",
    data: Data = None,
    counts: Counts = None,
    count_text: CountText = None,
    epochs: Epochs = None,
    learning_rate: LearningRate = None,
    batch_size: BatchSize = None,
    accumulation: Accumulation = None,
    max_length: MaxLength = None,
    precision: Precision = None,
    max_train_samples: MaxTrain = None,
    max_eval_samples: MaxEval = None,
    eval_batch_size: EvalBatchSize = 32,
    save_steps: SaveSteps = 500,
    keep_models: KeepModels = False,
    overwrite: RunAgain = False,
    as_json: AsJson = False,
) -> None:
    """Fine-tune dense and compressed models on tasks of GLUE, and score them on the validation sets.

    The defaults are those of the paper's authors: length 128, batches of 32, learning rate 2e-5, 3 epochs,
    seed 22.
    """
    from ..evaluate.glue import GLUE

    if unknown := [task for task in tasks or () if task not in GLUE]:
        raise ValueError(f"tasks: expected some of {', '.join(GLUE)}, got {', '.join(unknown)}")
    _fine_tune(
        model, [GLUE[task] for task in tasks or GLUE], as_json, output=output, methods=methods, ratio=ratio,
        seeds=seeds, freeze=freeze, data=data, counts=counts, count_text=count_text, epochs=epochs,
        learning_rate=learning_rate, batch_size=batch_size, accumulation=accumulation, max_length=max_length,
        precision=precision, max_train_samples=max_train_samples, max_eval_samples=max_eval_samples,
        eval_batch_size=eval_batch_size, save_steps=save_steps, keep_models=keep_models, overwrite=overwrite,
    )  # fmt: skip


@app.command(cls=ManyValues)
def squad(
    model: Model,
    output: Study,
    methods: Methods = None,
    ratio: Ratio = 5.0,
    seeds: Seeds = None,
    freeze: FreezeRule = "codes",
    data: Data = None,
    counts: Counts = None,
    count_text: CountText = None,
    epochs: Epochs = None,
    learning_rate: LearningRate = None,
    batch_size: BatchSize = None,
    accumulation: Accumulation = None,
    max_length: MaxLength = None,
    stride: Annotated[
        int | None, typer.Option(help="tokens that consecutive windows of a paragraph share")
    ] = None,
    precision: Precision = None,
    max_train_samples: MaxTrain = None,
    max_eval_samples: MaxEval = None,
    eval_batch_size: EvalBatchSize = 32,
    save_steps: SaveSteps = 500,
    keep_models: KeepModels = False,
    overwrite: RunAgain = False,
    as_json: AsJson = False,
) -> None:
    """Fine-tune dense and compressed models on SQuAD 1.1, and score them on the development set.

    The defaults are those of the paper's authors: length 384, stride 128, batches of 16, learning rate 3e-5,
    3 epochs, seed 22.
    """
    from ..evaluate.squad import SQUAD

    _fine_tune(
        model, [SQUAD], as_json, output=output, methods=methods, ratio=ratio, seeds=seeds, freeze=freeze,
        data=data, counts=counts, count_text=count_text, epochs=epochs, learning_rate=learning_rate,
        batch_size=batch_size, accumulation=accumulation, max_length=max_length, stride=stride,
        precision=precision, max_train_samples=max_train_samples, max_eval_samples=max_eval_samples,
        eval_batch_size=eval_batch_size, save_steps=save_steps, keep_models=keep_models, overwrite=overwrite,
    )  # fmt: skip


def _fine_tune(model: str, tasks: list[Task], as_json: bool, **options: Any) -> None:
    from ..evaluate.finetune import fine_tune

    given = {name: value for name, value in options.items() if value not in (None, [])}
    result = fine_tune(model, tasks, command=_command(), **given)
    if as_json:
        print_json(result)
    else:
        _print_scores(result)


def _print_scores(result: FineTuned) -> None:
    ratios = {score.method: score.ratio for score in result.scores}
    seeds = ", ".join(map(str, result.seeds))
    title = f"{result.model}, frozen: {result.freeze}, seeds {seeds}"
    shown = Table("task", "metric", title=escape(title))
    for method, ratio in ratios.items():
        shown.add_column(f"{method}\n{ratio:.2f}x", justify="right")
    by_cell = {(score.task, score.metric, score.method): str(score) for score in result.scores}
    for task, metric in dict.fromkeys((score.task, score.metric) for score in result.scores):
        shown.add_row(task, metric, *(by_cell[task, metric, method] for method in ratios))
    console().print(shown)


# ---- harnesses -------------------------------------------------------------------------------------------

Against = Annotated[str | None, typer.Option(help="another model to run, such as the dense one")]
Device = Annotated[str | None, typer.Option(help="device such as cpu or cuda")]
_MORE_OPTIONS = {"allow_extra_args": True}  # those after --


@app.command("lm-eval", cls=ManyValues, context_settings=_MORE_OPTIONS)
def lm_eval(
    context: typer.Context,
    model: Model,
    tasks: Annotated[
        list[str], typer.Option("--tasks", "--task", help="names of lm-eval's tasks", metavar="NAME...")
    ],
    against: Against = None,
    include_path: Annotated[Path | None, typer.Option(help="directory of your own task files (YAML)")] = None,
    batch_size: Annotated[str, typer.Option(help="requests per batch, or auto")] = "1",
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Run lm-evaluation-harness on a compressed or dense model.

    Further arguments of lm_eval.simple_evaluate follow two dashes: -- --num_fewshot 5 --limit 100
    """
    from ..evaluate.harness import parse_options, run_lm_eval

    run = run_lm_eval(
        model, tasks, against=against, include_path=include_path, batch_size=batch_size, device=device,
        command=_command(), **parse_options(context.args),
    )  # fmt: skip
    _print_run(run, as_json)


@app.command("mteb", cls=ManyValues, context_settings=_MORE_OPTIONS)
def mteb(
    context: typer.Context,
    model: Model,
    tasks: Annotated[
        list[str], typer.Option("--tasks", "--task", help="names of MTEB's tasks", metavar="NAME...")
    ],
    against: Against = None,
    languages: Annotated[
        list[str] | None,
        typer.Option(help="languages of multilingual tasks, such as eng", metavar="CODE..."),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="sentences per batch")] = 32,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Run MTEB on a compressed or dense sentence encoder.

    Further arguments of mteb.evaluate follow two dashes: -- --public_only
    """
    from ..evaluate.harness import parse_options, run_mteb

    run = run_mteb(
        model, tasks, against=against, languages=languages or None, batch_size=batch_size, device=device,
        command=_command(), **parse_options(context.args),
    )  # fmt: skip
    _print_run(run, as_json)


def _print_run(run: HarnessRun, as_json: bool) -> None:
    if as_json:
        print_json(run)
        return
    shown = Table("task", "metric", title=f"{run.harness} {run.version}")
    shown.add_column(escape(run.model), justify="right")
    if run.against is not None:
        shown.add_column(escape(run.against), justify="right")
        shown.add_column("difference", justify="right")
    for score in run.scores:
        value = _figure(score.value) + ("" if score.stderr is None else f" ± {score.stderr:.4f}")
        compared = [] if run.against is None else [_figure(score.against), _figure(score.difference, "+.4f")]
        shown.add_row(escape(score.task), escape(score.metric), value, *compared)
    console().print(shown)


def _figure(value: float | None, form: str = ".4f") -> str:
    return "-" if value is None else format(value, form)


def _command() -> str:
    """Return the command line of this process, for the record of a run."""
    return shlex.join(["embkern", *sys.argv[1:]])
