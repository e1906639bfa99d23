"""EDM's preconditioning (Karras et al. 2022, arXiv 2206.00364, table 1), written once for loss, denoise and export."""

from typing import Any


def scale(sigma: Any, xp: Any) -> tuple[Any, Any, Any, Any]:
    """Give ``c_skip, c_out, c_in, c_noise`` for data of unit variance (``sigma_data = 1``).

    Args:
        sigma: noise standard deviation, > 0, any shape.
        xp: ``numpy``, ``torch`` or an `OnnxNamespace`.

    Returns:
        Four arrays of sigma's shape; ``D(x) = c_skip x + c_out F(c_in x, c_noise)``.
    """
    variance = sigma * sigma + 1.0
    deviation = xp.sqrt(variance)
    return 1.0 / variance, sigma / deviation, 1.0 / deviation, xp.log(sigma) * 0.25
