"""The report of an INT8 artifact: what quantization cost, where, and what was tried.

page (report.html), text (a terminal) and compare (two artifacts) say what findings finds in
quantization.json, parity.json and the manifest; reading, markup and plots are what they are made
of. Knows no framework and no network.
"""
