"""Reads an ONNX graph for a lint: types, constants and shapes."""
