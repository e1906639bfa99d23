"""From a guard bundle and its target to a Triton model repository: graphs, configs, parity gate, installation."""
