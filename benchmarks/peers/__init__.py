"""The peers: other detectors, one file each, behind one interface. Adding one: a file, and a line in `PEERS`."""

from collections.abc import Callable
from typing import Final

from benchmarks.peers import latent_all, lda, meandist, ranks, ratio
from benchmarks.peers.badexpert import BadExpert
from benchmarks.peers.base import Inspected, Model, Peer
from benchmarks.peers.beatrix import Beatrix
from benchmarks.peers.ibdpsc import IbdPsc
from benchmarks.peers.knn import Knn
from benchmarks.peers.lfba import Lfba
from benchmarks.peers.mahalanobis import Mahalanobis
from benchmarks.peers.msp import Msp
from benchmarks.peers.probe import Probe
from benchmarks.peers.rmd import Rmd
from benchmarks.peers.scaleup import FreeScaleUp, ScaleUp
from benchmarks.peers.strip import Strip
from benchmarks.peers.teco import TeCo
from benchmarks.peers.ted import Ted
from benchmarks.peers.tedpp import TedPlusPlus
from benchmarks.peers.vim import Vim
from diffense.errors import OptionError

__all__ = ["PEERS", "REVISIONS", "Inspected", "Model", "Peer", "make_peer"]

PEERS: Final[dict[str, Callable[[], Peer]]] = {
    "strip": Strip,
    "scaleup": ScaleUp,
    "scaleup_free": FreeScaleUp,
    "ibdpsc": IbdPsc,
    "teco": TeCo,
    "beatrix": Beatrix,
    "lfba": Lfba,
    "ted": Ted,
    "tedpp": TedPlusPlus,
    "badexpert": BadExpert,
    "msp": Msp,
    "knn": Knn,
    "mahalanobis": Mahalanobis,
    "rmd": Rmd,
    "vim": Vim,
    "probe": Probe,
    "meandist": meandist.make,
    "ratio": ratio.make,
    "lda": lda.make,
    "ranks": ranks.make,
    "latent_all": latent_all.make,
    "latent_all_doubt": latent_all.make_allowing,
}


# Raise a peer's when anything that changes its figures is changed: those of before are marked, and measured again.
REVISIONS: Final[dict[str, int]] = dict.fromkeys(PEERS, 0) | {"ibdpsc": 1, "rmd": 1, "ted": 1, "tedpp": 1}


def make_peer(name: str) -> Peer:
    """A fresh, unfitted peer.

    Raises:
        OptionError: there is none of that name.
    """
    if name not in PEERS:
        raise OptionError(f"there is no peer {name!r}; known are {', '.join(PEERS)}")
    return PEERS[name]()
