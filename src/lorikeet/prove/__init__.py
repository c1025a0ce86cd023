"""Proof: is the tuned model better than its base, on conversations that tuning never saw?

`stage.prove` runs it on an exported run: `scoring` scores with the engine that serves, `compare` does the statistics,
`speech` says whether an answer can be spoken, `report` writes `proof.json` and `proof.html`.
"""
