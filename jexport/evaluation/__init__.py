"""What an artifact is held against: the reference library's vectors, and what tells them apart.

Knows no target, no engine and no artifact.
"""
