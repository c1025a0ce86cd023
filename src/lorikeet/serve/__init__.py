"""Serving: one turn of talk (`assistant`), its HTTP (`http`, `guard`), the page (`ui`), and how all of it starts (`launch`)."""
