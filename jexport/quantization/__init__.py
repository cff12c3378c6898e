"""int8: what quantize is made of, one step a file.

products (which matrices), statistics (what goes into them), outliers (channels that are copied),
smoothing and rounding (numbers), graph (Q/DQ nodes), search (which treatment each gets). Knows no
engine: a Runner runs graphs for it.
"""
