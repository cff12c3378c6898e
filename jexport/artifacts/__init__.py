"""The artifact: its manifest, its place, its model card and its report."""
