"""Importing initialises no device, loads torch at first use, and works with and without transformers."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest


def python(script: str, *flags: str) -> str:
    done = subprocess.run(
        [sys.executable, *flags, "-c", textwrap.dedent(script)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_is_light():
    loaded = python("import sys, embkern; print(*({'torch', 'transformers', 'numpy'} & set(sys.modules)))")
    assert loaded == ""


def test_the_ops_load_no_compiler():
    loaded = python("import sys, embkern.ops; print('torch._dynamo' in sys.modules)")
    assert loaded == "False", "torch._dynamo takes longer to import than all of embkern"


def test_nothing_initialises_cuda():
    script = """
        import torch, embkern, embkern.ops, embkern.methods
        embkern.FactorizedEmbedding(4, 3, 2)(torch.tensor([1]))
        print(torch.cuda.is_initialized())
    """
    assert python(script) == "False"


@pytest.mark.parametrize(
    "order",
    [
        "import embkern; import transformers",
        "import transformers; import embkern",
        *(
            pytest.param(order, marks=pytest.mark.slow)
            for order in (
                "import transformers.quantizers.auto; import embkern",
                "import embkern; from transformers import AutoModel",
                "import embkern, embkern.models.quantizer",
            )
        ),
    ],
)
def test_registration_with_transformers_in_either_order(order):
    pytest.importorskip("transformers")
    script = f"""
        {order}
        from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
        print("embkern" in AUTO_QUANTIZATION_CONFIG_MAPPING, "embkern" in AUTO_QUANTIZER_MAPPING)
    """
    assert python(script) == "True True"


def test_the_name_of_the_method_is_that_of_the_config():
    pytest.importorskip("transformers")
    from embkern import _registration
    from embkern.models import config

    assert _registration.QUANT_METHOD == config.QUANT_METHOD


def test_registration_where_the_quantizers_themselves_import_torch_first():
    script = """
        import sys, types
        auto = sys.modules["transformers.quantizers.auto"] = types.ModuleType("transformers.quantizers.auto")
        import embkern  # as by torch, before the module is complete
        auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AUTO_QUANTIZER_MAPPING = {}, {}
        import wave  # any later import
        print(*auto.AUTO_QUANTIZATION_CONFIG_MAPPING, *auto.AUTO_QUANTIZER_MAPPING, len(sys.modules) < 200)
        watching = [finder for finder in sys.meta_path if "embkern" in type(finder).__module__]
        print(len(watching), any("transformers.quantizers.auto" in finder.pending for finder in watching))
    """
    assert python(script).split() == ["embkern", "embkern", "True", "1", "False"]


def test_dense_static_embeddings_load_as_before_and_import_nothing():
    script = """
        import sys, types
        library = types.ModuleType("StaticEmbedding")
        sys.modules["sentence_transformers.models.StaticEmbedding"] = library
        class StaticEmbedding:
            @classmethod
            def load(cls, path, **kwargs):
                "Load."
                return cls, path, kwargs
        library.StaticEmbedding = StaticEmbedding
        import embkern
        from embkern._registration import install
        hooked = StaticEmbedding.__dict__["load"]
        install()
        print(StaticEmbedding.__dict__["load"] is hooked, StaticEmbedding.load.__doc__)
        class Own(StaticEmbedding): pass
        print(Own.load("here", token=1) == (Own, "here", dict(token=1)), "torch" in sys.modules)
    """
    assert python(script).split() == ["True", "Load.", "True", "False"]


def test_the_entry_point_of_torch_imports_next_to_nothing():
    script = "from embkern._registration import install; import sys; install(); print(*sys.modules)"
    loaded = {name for name in python(script).split() if name.startswith("embkern")}
    assert loaded == {"embkern", "embkern._registration", "embkern._version"}


def test_ops_methods_and_layer_work_without_transformers():
    script = """
        import sys
        class Absent:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] == "transformers":
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        sys.meta_path.insert(0, Absent())
        import torch, embkern
        from embkern.methods import autoencoder, svd
        from embkern.ops import cosine_mse_loss, gather_project
        table = torch.randn(20, 6)
        factors = svd(table, 2)
        embkern.FactorizedEmbedding.from_factors(factors)(torch.tensor([1])).sum()
        autoencoder(table, 2, epochs=1)
        cosine_mse_loss(table, table)
        embkern.Recipe.parse(ratio=2)
        try:
            embkern.compress
        except ImportError as error:
            print(error)
    """
    assert python(script).startswith("embkern.compress needs transformers")


def test_every_public_name_resolves():
    script = "import embkern; print(all(getattr(embkern, name) is not None for name in embkern.__all__))"
    assert python(script) == "True"
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        import embkern

        _ = embkern.nonsense
