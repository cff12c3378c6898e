"""publish: Artifact -> a place that servers pull from.

Not built yet: artifacts are folders, so `cp -r` and any object store's own client carry them, and
`jexport verify` checks them where they arrive.
"""
