"""Names of ONNX's types: by number, by size in bits, and as operator schemas write them.

A type that TensorRT has is called as TensorRT calls it; another keeps ONNX's own name.
"""

from __future__ import annotations

from collections.abc import Mapping

_TABLE = """
1 FP32 32 float        2 UINT8 8 uint8            3 INT8 8 int8              4 UINT16 16 uint16
5 INT16 16 int16       6 INT32 32 int32           7 INT64 64 int64           8 STRING 0 string
9 BOOL 8 bool          10 FP16 16 float16         11 DOUBLE 64 double        12 UINT32 32 uint32
13 UINT64 64 uint64    14 COMPLEX64 64 -          15 COMPLEX128 128 -        16 BF16 16 bfloat16
17 FP8 8 float8e4m3fn  18 FLOAT8E4M3FNUZ 8 -      19 FLOAT8E5M2 8 -          20 FLOAT8E5M2FNUZ 8 -
21 UINT4 4 -           22 INT4 4 -                23 FP4 4 -                 24 FLOAT8E8M0 8 -
"""
"""Number, name, bits (0: no fixed width), and what operator schemas write (-: not looked up)."""

_NUMBERS, _NAMES, _BITS, _WORDS = (_TABLE.split()[column::4] for column in range(4))

TYPES: Mapping[int, str] = {int(at): name for at, name in zip(_NUMBERS, _NAMES, strict=True)}
BITS: Mapping[str, int] = {
    name: int(bits) for name, bits in zip(_NAMES, _BITS, strict=True) if int(bits)
}
IN_SCHEMAS: Mapping[str, str] = {
    f"tensor({word})": name for word, name in zip(_WORDS, _NAMES, strict=True) if word != "-"
}
"""As operator schemas write them."""
