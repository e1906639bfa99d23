"""The four latent peers on the guard's taps, bands and rule at once."""

from typing import Any

from benchmarks.peers.distances import DistanceFamily
from benchmarks.peers.latent import Family, LatentPeer
from benchmarks.peers.lda import Posterior
from benchmarks.peers.ranks import Ranks


def make() -> LatentPeer:
    """Distances, ratios, posteriors and ranks, each kind with the same weight."""
    return LatentPeer("latent_all", "Four kinds of latent evidence", *list_families())


def make_allowing() -> LatentPeer:
    """The same, doubt excused as Diffense excuses it: what chain and network have to beat."""
    return LatentPeer("latent_all_doubt", "Four kinds of latent evidence, by doubt", *list_families(), allowing=True)


def list_families() -> list[Family[Any]]:
    """The kinds of evidence of the other latent peers on the guard's taps, bands and rule; none needs a network."""
    return [DistanceFamily("strangeness"), DistanceFamily("mismatch"), Posterior(), Ranks()]
