"""The attacks, by key. A new one is one file and one line here."""

from typing import Final

from benchmarks.attacks.adaptive import AdaptiveWaNet
from benchmarks.attacks.badnets import BadNets
from benchmarks.attacks.base import Attack
from benchmarks.attacks.blend import Blend
from benchmarks.attacks.htba import Htba
from benchmarks.attacks.idba import Idba
from benchmarks.attacks.issba import Issba
from benchmarks.attacks.none import Unpoisoned
from benchmarks.attacks.tact import TaCT
from benchmarks.attacks.wanet import WaNet
from benchmarks.datasets import Spec
from diffense.errors import OptionError

ATTACKS: Final[dict[str, type[Attack]]] = {
    a.key: a for a in (BadNets, Idba, WaNet, Issba, Htba, Blend, TaCT, Unpoisoned, AdaptiveWaNet)
}
MATRIX: Final = ("badnets", "idba", "wanet", "issba", "htba")
UNSEEN: Final = ("blend", "tact")  # on which no setting was chosen; what is neither is a control


def find_attack(key: str) -> type[Attack]:
    """Look an attack up by its key.

    Raises:
        OptionError: there is none of that name.
    """
    if key not in ATTACKS:
        raise OptionError(f"unknown attack {key!r}; known: {', '.join(ATTACKS)}")
    return ATTACKS[key]


def make_attack(key: str, spec: Spec, seed: int) -> Attack:
    """Make an attack on an image set.

    Raises:
        OptionError: there is none of that name.
    """
    return find_attack(key)(spec, seed)
