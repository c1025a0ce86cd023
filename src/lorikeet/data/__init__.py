"""Conversations: `load` (files and formats), `clean` (dedupe, split). The packaged data lies in `spoken/`."""
