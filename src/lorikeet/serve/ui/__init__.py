"""The page: a Gradio app over `assistant` and `speech`, and nothing else of the server.

mount_page(app, {"my-model": assistant}, ears=ears, voice=voice)
"""

from __future__ import annotations

import os

# Before gradio is imported: no usage reports, no version check, no look-ups of the hub.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from lorikeet.serve.ui.page import mount_page  # after the settings above

__all__ = ["mount_page"]
