"""Export: an adapter and its base -> the three artefacts: adapter, merged 16-bit, GGUF. No compiler.

`stage.export` runs it on a run folder; `merge` adds the adapter into the base's weights; `gguf` writes llama.cpp's
format. Every function goes from a local path to a local path.
"""
