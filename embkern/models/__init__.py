"""Models of transformers: find the embedding table, replace it by a compressed one, save, load and resize.

Of the library layers, only this one and those above it need transformers.
"""

try:
    import transformers as _  # noqa: F401
except ImportError as error:
    raise ImportError(
        "embkern.compress needs transformers (pip install 'embkern[transformers]'); "
        "embkern.ops, embkern.methods and embkern.FactorizedEmbedding work without it"
    ) from error
