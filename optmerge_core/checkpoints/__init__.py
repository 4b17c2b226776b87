"""Files only: opening, reading and writing checkpoints, wherever they are."""

import re

HUB_ID = re.compile(r"(?P<id>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>\w[\w./-]*))?")
URL = re.compile(r"https?://\S+", re.IGNORECASE)
"""What a location is that is no folder; here, since a recipe's are looked at without torch."""
