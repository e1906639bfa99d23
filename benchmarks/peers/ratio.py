"""Squared distance to the predicted class's mean over that to the nearest other class's, per tap and part."""

from benchmarks.peers.distances import DistanceFamily
from benchmarks.peers.latent import LatentPeer


def make() -> LatentPeer:
    """Mismatch by class means, Diffense's rule."""
    return LatentPeer("ratio", "Own/other ratio", DistanceFamily("mismatch"))
