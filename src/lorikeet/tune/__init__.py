"""Tuning: a base model and conversations -> a run folder with the adapter that validated best.

`loop` is the stage, readable from top to bottom; `batches` packs conversations; `adapter` loads the base and applies
LoRA; `fast` scores a batch by way of `attention`, `linear` and `loss`; `optimizer` and `schedule` make the step;
`forecast` says beforehand what a run takes; `checkpoint` writes and restores; `track`, `live` and `plot` show; `sweep`
runs several and compares.
"""

import logging

# Imported with PEFT, it warns on every start of a kernel that it would fetch from a hub.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
