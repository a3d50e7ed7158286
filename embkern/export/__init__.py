"""Compressed models in the formats of other runtimes, which need neither embkern nor torch.

``onnx`` writes a model whose table stays compressed and is decoded by ONNX operators, or is in blocks for
onnxruntime's own. ``gguf`` writes a language model whose table is in blocks of GGML.
"""
