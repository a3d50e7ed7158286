"""Compressed models in the formats of other runtimes, which need neither embkern nor torch.

``onnx`` writes a model whose table stays packed and is decoded by ONNX operators.
"""
