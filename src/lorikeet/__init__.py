"""Lorikeet: teach a small language model on your own conversations, prove that it got better, talk with it.

Data flows one way: data -> tune -> export -> prove -> serve. Each stage reads a folder and writes a folder.
"""

import logging

# Where PEFT imports it, it warns at every start of a kernel that it would fetch from a hub.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

__version__ = "0.1.0"
