"""Tuning: a base model and conversations -> a run folder with the adapter that validated best.

`loop` is the stage, readable from top to bottom; `batches` packs conversations, `loss` scores them, `adapter` applies
LoRA, `schedule` gives the learning rate, `checkpoint` writes and restores, `plot` draws the loss.
"""
