"""The child process of `engine.LlamaEngine`: llama.cpp's server on a loopback port, and nothing else.

It reads one line of JSON settings from stdin, writes `PORT n` to stdout when the model is loaded, and ends when stdin
closes, so that it never outlives its parent.
"""

from __future__ import annotations

import json
import os
import sys


def main() -> None:
    """Serve until stdin closes."""
    settings = json.loads(sys.stdin.readline())
    port_pipe = os.dup(1)
    os.dup2(2, 1)  # llama.cpp writes to stdout too; only the port may go there
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = settings["gguf"]
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.api_keys = [settings["key"]]
    params.cors_origins = "http://127.0.0.1"
    params.n_ctx = settings["context_tokens"]
    params.n_parallel = settings["slots"]
    params.n_gpu_layers = 0
    params.cpuparams.n_threads = settings["threads"]
    params.cpuparams_batch.n_threads = settings["threads"]
    params.use_jinja = True
    params.prefill_assistant = False  # a conversation that ends with the assistant's turn gets a new one
    params.verbosity = 1
    params.ui = False
    params.cache_ram_mib = 0
    params.sse_ping_interval = 1  # while a prompt is read, so that a client that left is noticed
    # Between batches it looks who has left and goes on with others' answers; a batch of 512 is computed in one go anyway.
    params.n_batch = params.n_ubatch = 512
    params.endpoint_slots = False  # it would show what others ask
    if settings["scoring"]:
        params.embedding = True
        params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_NONE
        params.n_batch = params.n_ubatch = settings["context_tokens"]
        params.warmup = False
    server = xllamacpp.Server(params)
    os.write(port_pipe, f"PORT {server.listening_address.rsplit(':', 1)[1]}\n".encode())
    os.close(port_pipe)
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
