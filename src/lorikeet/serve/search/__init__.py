"""Looking things up: `decide` says when and why, `query` what is asked, `provider` asks, `service` keeps it polite.

`clean` and `rank` make what comes back fit to be read; `budget` says how much of it a machine can afford.
"""
