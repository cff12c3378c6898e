"""Frameworks that embed through jexport: one file per framework, named after it.

    pair.py          Pair: queries and documents with artifacts that belong together
    langchain.py     JexportEmbeddings, LangChain's interface (extra `langchain`)
    llama_index.py   JexportEmbedding, LlamaIndex's interface (extra `llama-index`)

Each framework is imported by its own file only, so nothing is re-exported here.
"""
