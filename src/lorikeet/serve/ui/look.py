"""How the page looks: theme, style sheet and mark, all from this package; nothing is fetched from elsewhere.

    gr.mount_gradio_app(app, page, path="/", theme=theme(), css_paths=[STYLE], head=HEAD)

The colours are a rainbow lorikeet's: leaf green for what is ours to press, blue for what is the user's, orange and red
where something asks for attention; the rest is quiet.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

_LEAF = gr.themes.Color(
    c50="#eef7f1", c100="#d8ecdf", c200="#b2d9c0", c300="#82c09a", c400="#4fa374", c500="#2a8757", c600="#14663f",
    c700="#115535", c800="#0f442b", c900="#0c3522", c950="#061e13", name="leaf",
)  # fmt: skip
_SKY = gr.themes.Color(
    c50="#eef4fb", c100="#dbe7f6", c200="#b9d0ee", c300="#8db2e2", c400="#5c8ed2", c500="#366fbd", c600="#26569b",
    c700="#1f457d", c800="#1b3963", c900="#172e4e", c950="#0e1d33", name="sky",
)  # fmt: skip
_STONE = gr.themes.Color(
    c50="#f8f9f6", c100="#f0f2ed", c200="#e0e5dd", c300="#c6cec4", c400="#97a39a", c500="#6d7a72", c600="#526058",
    c700="#3b4841", c800="#222d27", c900="#18211c", c950="#0f1613", name="stone",
)  # fmt: skip

_FONTS = ("ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "sans-serif")
_MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")


def theme() -> Any:
    """Return the page's Gradio theme."""
    base = gr.themes.Base(
        primary_hue=_LEAF,
        secondary_hue=_SKY,
        neutral_hue=_STONE,
        radius_size=gr.themes.sizes.radius_lg,
        font=_FONTS,
        font_mono=_MONO,
    )
    return base.set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        block_background_fill="transparent",
        block_background_fill_dark="transparent",
        block_border_width="0px",
        block_shadow="none",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_text_color="white",
        color_accent_soft="*secondary_50",
        color_accent_soft_dark="*secondary_900",
    )


def mark(size_px: int) -> str:
    """Return the lorikeet's head as inline SVG."""
    return (
        f'<svg class="mark" width="{size_px}" height="{size_px}" viewBox="0 0 48 48" aria-hidden="true">'
        '<rect width="48" height="48" rx="24" fill="#14663f"/>'
        '<path d="M16 48C13 41 12 34 12 26 12 16 19 9 28 9c10 0 15 8 15 17 0 9-1 15-4 22z" fill="#2b62b4"/>'
        '<path d="M14 38c9 3 19 1 28-7-.4 6-1 11-3 17H16c-1-3-2-7-2-10z" fill="#e2572b"/>'
        '<path d="M15 43c8 2 17 1 26-5l-2 10H16z" fill="#f2a02e"/>'
        '<path d="M22 20c-9-1-15 4-16 11 5-2 8-1 10 3 6 0 10-4 10-9 0-3-1-5-4-5z" fill="#f28a2e"/>'
        '<circle cx="30" cy="20" r="4.4" fill="#fff"/><circle cx="29.4" cy="20" r="2.4" fill="#14201a"/></svg>'
    )


STYLE = Path(__file__).parent / "page.css"
HEAD = '<meta name="color-scheme" content="light dark"><script src="live/live.js" defer></script>'
