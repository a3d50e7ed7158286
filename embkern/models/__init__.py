"""Models of transformers: find the embedding table, swap a compressed one in, save, load and resize.

Only this package and what is built on it need transformers.
"""

try:
    import transformers as _  # noqa: F401
except ImportError as error:
    raise ImportError(
        "embkern.compress needs transformers (pip install 'embkern[transformers]'); "
        "embkern.ops, embkern.methods and embkern.FactorizedEmbedding work without it"
    ) from error
