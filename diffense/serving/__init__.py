"""What the served Python models do with a batch of requests; needs NumPy and a guard's `Scorer`, no ONNX.

The server's own module, ``triton_python_backend_utils``, exists only inside the server and is handed in as ``backend``.
"""
