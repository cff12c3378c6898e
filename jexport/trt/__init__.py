"""trt: what TensorRT takes and what it is asked for; knows no GPU at hand and imports no engine."""
