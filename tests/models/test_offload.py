"""Compressed models on the meta device and on accelerate's device maps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

T = pytest.importorskip("transformers")

from tests.example_models import build, outputs
from tests.models.compressing import assert_shared, compressed, reload

pytestmark = pytest.mark.usefixtures("quantizing")


def test_a_model_goes_to_meta_and_back_and_keeps_its_ties(tmp_path, kind):
    model = compressed(build("bert"), kind)
    expected, state = outputs(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    others = {name: buffer.clone() for name, buffer in model.named_buffers() if name not in state}
    over = (model.get_input_embeddings(), model.get_output_embeddings())
    model.to("meta")
    assert_shared(*over)
    model.to_empty(device="cpu")
    assert_shared(*over)
    with torch.no_grad():
        for name, buffer in others.items():  # those that no state dict has
            model.get_buffer(name).copy_(buffer)
    model.load_state_dict(state)
    model.tie_weights()
    assert torch.equal(outputs(model), expected)
    assert_close(outputs(reload(model, tmp_path)), expected)


def places(embedding: str, head: str) -> dict[str, str]:
    body = dict.fromkeys(("model.layers", "model.norm", "model.rotary_emb"), "cpu")
    return {"model.embed_tokens": embedding, **body, "lm_head": head}


def test_a_table_is_offloaded_whole_or_not(tmp_path, kind):
    pytest.importorskip("accelerate")
    model = compressed(build("llama-tied"), kind)
    model.save_pretrained(tmp_path / "small")

    def load(device_map: dict[str, str]) -> Any:
        return type(model).from_pretrained(
            tmp_path / "small", device_map=device_map, offload_folder=tmp_path / "off"
        )

    for device_map in (places("disk", "disk"), places("cpu", "cpu"), {"": "cpu"}):
        assert_close(outputs(load(device_map)), outputs(model))
    for embedding, head in (("disk", "cpu"), ("cpu", "disk")):
        message = (
            f"'model.embed_tokens': '{embedding}', 'lm_head': '{head}'; put all of them on the disk, or none"
        )
        with pytest.raises(ValueError, match=message):
            load(places(embedding, head))


def test_accelerate_loads_into_a_skeleton_from_a_config(tmp_path, kind):
    accelerate = pytest.importorskip("accelerate")
    model = compressed(build("bert"), kind)
    model.save_pretrained(tmp_path / "small")
    config = T.AutoConfig.from_pretrained(tmp_path / "small")
    with accelerate.init_empty_weights():
        skeleton = T.AutoModelForMaskedLM.from_config(config).eval()
    skeleton.tie_weights()  # which init_empty_weights breaks, of dense models, too
    assert isinstance(config.quantization_config, dict)  # a copy was changed
    with pytest.raises(
        ValueError, match="its compressed table is offloaded, or was not loaded; from_pretrained"
    ):
        outputs(skeleton)
    loaded = accelerate.load_checkpoint_and_dispatch(skeleton, tmp_path / "small", device_map={"": "cpu"})
    assert_close(outputs(loaded), outputs(model))
    assert_shared(loaded.get_input_embeddings(), loaded.get_output_embeddings())
    assert_close(outputs(reload(loaded, tmp_path / "again")), outputs(model))
    dense = T.AutoModelForMaskedLM.from_config(config)  # random weights elsewhere than on meta, as before
    assert isinstance(dense.get_input_embeddings(), torch.nn.Embedding)
