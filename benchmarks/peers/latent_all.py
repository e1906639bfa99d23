"""All latent peers at once."""

from typing import Any

from benchmarks.peers.distances import DistanceFamily
from benchmarks.peers.latent import Family, LatentPeer
from benchmarks.peers.lda import Posterior
from benchmarks.peers.ranks import Ranks


def make() -> LatentPeer:
    """Distances, ratios, posteriors and ranks, each kind with the same weight."""
    return LatentPeer("latent_all", "All without network", *list_families())


def make_allowing() -> LatentPeer:
    """The same, doubt excused as Diffense excuses it: what chain and network have to beat."""
    return LatentPeer("latent_all_doubt", "All without network, by doubt", *list_families(), allowing=True)


def list_families() -> list[Family[Any]]:
    """Every kind of evidence that needs no network."""
    return [DistanceFamily("strangeness"), DistanceFamily("mismatch"), Posterior(), Ranks()]
