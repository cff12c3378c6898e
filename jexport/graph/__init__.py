"""Steps on ONNX graphs: each takes an onnx_ir model and changes what its name says, or raises.

The whole package is imported inside functions of `stages/` and `targets/`, because it needs torch
(traceable.py, overflow.py) or onnx_ir (the rest). It knows no engine's API and no file layout.
"""
