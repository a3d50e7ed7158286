"""Data-parallel training of compressed models: two processes on gloo do what one process does."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("transformers")

from safetensors.torch import load_file

from embkern import unfreeze_table
from tests.example_models import build, outputs
from tests.methods.processes import environments
from tests.models.compressing import compressed, reload

pytestmark = [
    pytest.mark.usefixtures("quantizing"),
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch was built without gloo"),
]

# A step on half of the batch in each process. The second one begins with other buffers and parameters, which
# DDP replaces by those of the first, and writes to a buffer again, which the next forward replaces.
# What holds the process group is freed before it ends: a thread of gloo that frees a tensor while Python ends
# aborts the process.
WORKER = """
import gc, sys, torch, embkern
from torch.distributed import destroy_process_group, init_process_group
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

def train(source, output):
    rank = torch.distributed.get_rank()
    model = AutoModelForCausalLM.from_pretrained(source)
    embedding = model.get_input_embeddings()
    embkern.unfreeze_table(model)
    def damage():
        if rank:
            for buffer in embedding.buffers():
                buffer.zero_()
    damage()
    ddp = DistributedDataParallel(model, broadcast_buffers=True)
    damage()
    ids = torch.arange(3, 21).reshape(2, 9)[rank : rank + 1]
    optimizer = torch.optim.SGD(ddp.parameters(), 1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        ddp(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    torch.save({name: tensor for name, tensor in model.state_dict().items()}, f"{output}/{rank}.pt")

init_process_group("gloo")
train(*sys.argv[1:])
gc.collect()
torch.distributed.barrier()
destroy_process_group()
"""


# A method that a process knows which does not import the tests.
METHODS = {"factors": {}, "packed": {"method": "allocate", "ratio": 2}}


@pytest.mark.slow
def test_two_processes_train_like_one(tmp_path, kind):
    source = reload(compressed(build("llama-tied"), kind, **METHODS[kind]), tmp_path / "small")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tmp_path / "small"), str(tmp_path)],
            env={**os.environ, **each},
            stderr=subprocess.PIPE,
            text=True,
        )
        for each in environments(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors

    unfreeze_table(source)
    ids = torch.arange(3, 21).reshape(2, 9)
    optimizer = torch.optim.SGD(source.parameters(), 1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        source(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name, expected in source.state_dict().items():
        first, second = (result[name] for result in results)
        assert torch.equal(first, second), name
        assert_close(first, expected, rtol=1e-4, atol=1e-5)


TRAINER = """
import gc, sys, torch, embkern
from accelerate import PartialState
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

source, output = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(source)
data = [{"input_ids": row, "labels": row} for row in torch.arange(3, 39).reshape(4, 9)]
arguments = TrainingArguments(
    output + "/run", max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True,
    disable_tqdm=True, ddp_backend="gloo", save_strategy="no",
)
trainer = Trainer(model, arguments, train_dataset=data)
trainer.train()
assert trainer.args.world_size == 2
trainer.save_model(output + "/out")
del trainer, model
gc.collect()
PartialState().destroy_process_group()
"""


@pytest.mark.slow
def test_trainer_runs_under_torchrun(tmp_path, kind):
    pytest.importorskip("accelerate")
    model = reload(compressed(build("llama-tied"), kind, **METHODS[kind]), tmp_path / "small")
    (tmp_path / "train.py").write_text(TRAINER)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launch, tmp_path / "train.py", tmp_path / "small", tmp_path]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    trained = type(model).from_pretrained(tmp_path / "out")
    assert not torch.equal(outputs(trained), outputs(model))
    before, after = (load_file(tmp_path / each / "model.safetensors") for each in ("small", "out"))
    for name, tensor in before.items():  # of the dtypes of the format
        assert after[name].dtype == tensor.dtype, name


def test_a_module_holds_no_dtype_that_gloo_and_nccl_do_not_send(tmp_path, kind):
    model = compressed(build("llama-tied"), kind)
    sent = {torch.uint8, torch.int8, torch.int32, torch.int64}
    for each in (model, reload(model, tmp_path)):
        for name, tensor in [*each.named_parameters(), *each.named_buffers()]:
            assert tensor.is_floating_point() or tensor.dtype in sent, name
