"""Tuning: a base model and conversations -> a run folder with the adapter that validated best.

`loop` is the stage, readable from top to bottom; `batches` packs conversations; `adapter` loads the base and applies
LoRA; `fast` scores a batch by way of `attention`, `linear` and `loss`; `learner` takes a step with `optimizer`, at the
rate of `schedule`; `forecast` says beforehand what a run takes; `checkpoint` writes and restores; `progress`, `track`,
`live` and `plot` show; `stop` ends it from outside; `sweep` runs several and compares.
"""
