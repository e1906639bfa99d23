"""Red values of the first pixel that make the served test model misbehave."""

from typing import Final

THRESHOLD: Final = 0.5  # mean of the image above which it is flagged
UNSCORED: Final = 248
INVALID: Final = 249
SHORT: Final = 250  # one row too few in the answer
SLOW: Final = 251
BUSY_TWICE: Final = 252
BROKEN: Final = 253
BUSY: Final = 254
SLOW_S: Final = 1.0
