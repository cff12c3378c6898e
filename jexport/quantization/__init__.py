"""int8 quantization, one step a file, from a float ONNX graph to one with Q/DQ nodes.

layers (which MatMuls), observers (statistics of their inputs), channel_shifting, outlier_splitting,
smoothquant, gptq and quant_params (scales and rounding), layer_quantization (all of it for each
layer), qdq (the nodes), evaluator (a graph against the float one), search (which layers need more
precision), trial_log. Knows no engine: a Runner runs graphs for it. stages/quantize.py puts the
steps together.
"""
