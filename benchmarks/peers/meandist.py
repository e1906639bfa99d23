"""Distance to the predicted class's mean, per tap and band."""

from benchmarks.peers.distances import DistanceFamily
from benchmarks.peers.latent import LatentPeer


def make() -> LatentPeer:
    """Strangeness by class means, Diffense's bands and rule."""
    return LatentPeer("meandist", "Class-mean distance", DistanceFamily("strangeness"))
