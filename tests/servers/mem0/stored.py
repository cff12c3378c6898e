"""Rows of a Milvus Lite file as JSON: `python stored.py FILE COLLECTION`. Imports no jexport."""

from __future__ import annotations

import json
import sys

from pymilvus import MilvusClient

client = MilvusClient(uri=sys.argv[1])
client.load_collection(sys.argv[2])
rows = client.query(sys.argv[2], filter="", limit=100, output_fields=["vectors", "metadata"])
print(
    json.dumps(
        [
            {
                "text": row["metadata"]["data"],
                "person": row["metadata"]["user_id"],
                "vector": [float(value) for value in row["vectors"]],
            }
            for row in rows
        ]
    )
)
client.close()
