"""Serving: one turn of conversation as events (`assistant`), and what stands around it.

`http` is the OpenAI-compatible API with the page mounted beside it, `guard` keeps strangers out, `ui` is the page,
`search` looks things up, `server` listens, `launch` puts all of it together:

    serve(Path("model-q8_0.gguf"), ServeConfig(), system_prompt="...", model_name="my-model")

What is served is the file that was exported and proved; nothing here knows of tuning.
"""
