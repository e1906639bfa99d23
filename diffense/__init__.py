"""Diffense guards an image classifier at run time against backdoor triggers.

One sign rule everywhere: ``score`` is higher for more suspicious inputs, ``p_value`` is lower.
"""

__version__ = "0.1.0"
