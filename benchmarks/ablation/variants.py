"""The variants: each is the default with one part changed. Adding one: a line in `VARIANTS`."""

from dataclasses import dataclass, replace
from typing import Final, Literal

import numpy as np

from diffense.denoiser import HIDDEN
from diffense.latent import GRID
from diffense.rule import DEEP
from diffense.scoring import BAND_EDGES
from diffense.settings import FitSettings

DEFAULTS: Final = FitSettings()


@dataclass(frozen=True)
class Variant:
    """What is changed; the fields' defaults are the guard's, but for `strangest` and `draws`.

    Attributes:
        name: as in the table.
        group: part of the method that it is about.
        taps: which taps are read.
        doubt: whether doubt guides the latents, beside the label.
        chain: what a tap is guessed from: the shallower taps, no tap, or every other tap.
        divided: whether the error of that guess is divided by its covariance.
        by_label: whether that covariance is the predicted label's, shrunk, or shared.
        network: whether there is a learned part.
        units: its width.
        strangest: share of the clean images; it does not learn from them.
        label_guidance, data_guidance, sigmas, steps: as in `FitSettings`.
        span: instead of `sigmas` one level, of the shallowest and of the deepest tap; between them in even ratios.
        draws: likewise, but for the default.
        distance: to the mean of the samples, to the nearest, or the mean of the distances.
        edges: of the bands.
        kinds: of evidence that count.
        parts: whether the mismatch is also measured of a tap's leading directions and of the rest.
        allowance: whether doubt excuses some of the mismatch.
        deep: weight of the deeper half of the taps.
        rule: how surprises become one score: tap by tap, or all pieces at once.
        grid: parts of a tap's map each way whose means are read; 1 makes it a vector.
    """

    name: str
    group: str
    taps: Literal["all", "first half", "second half", "last"] = "all"
    doubt: bool = True
    chain: Literal["shallower", "none", "others"] = "shallower"
    divided: bool = True
    by_label: bool = False
    network: bool = True
    units: int = HIDDEN
    strangest: float = 0.0  # as in all rows there are; the guard leaves out a hundredth since (docs/decisions/0033)
    label_guidance: float = DEFAULTS.label_guidance
    data_guidance: float = DEFAULTS.data_guidance
    sigmas: tuple[float | tuple[float, ...], ...] = DEFAULTS.sigmas
    span: tuple[float, float] | None = None
    steps: int = DEFAULTS.steps
    draws: int = 4  # as in all rows there are; the guard takes two since (docs/decisions/0028)
    distance: Literal["mean", "nearest", "each"] = "mean"
    edges: tuple[int, ...] = BAND_EDGES
    kinds: tuple[str, ...] = ("strangeness", "mismatch")
    parts: bool = True
    allowance: bool = True
    deep: float = DEEP
    rule: Literal["taps", "squares", "pieces", "max", "z"] = "taps"
    grid: int = GRID

    def lay_levels(self, taps: int) -> tuple[float | tuple[float, ...], ...]:
        """The levels as `FitSettings.sigmas` has them."""
        return self.sigmas if self.span is None else (tuple(np.geomspace(*self.span, taps).tolist()),)


DEFAULT: Final = Variant("default", "default")
CLOSED: Final = Variant("closed-form chain (network off)", "learned part", network=False)

VARIANTS: Final = (
    DEFAULT,
    CLOSED,
    replace(DEFAULT, name="strangeness alone", group="evidence", kinds=("strangeness",)),
    replace(CLOSED, name="strangeness alone, network off", group="evidence", kinds=("strangeness",)),
    replace(DEFAULT, name="mismatch alone", group="evidence", kinds=("mismatch",), network=False),
    replace(DEFAULT, name="mismatch of whole taps alone", group="evidence", parts=False),
    replace(DEFAULT, name="no allowance for doubt in the mismatch", group="evidence", allowance=False),
    replace(DEFAULT, name="label alone guides, no doubt", group="guidance", doubt=False),
    replace(CLOSED, name="label alone guides, no doubt, network off", group="guidance", doubt=False),
    replace(DEFAULT, name="label guidance of the network off", group="guidance", label_guidance=0.0),
    replace(DEFAULT, name="label guidance 2", group="guidance", label_guidance=2.0),
    replace(DEFAULT, name="data guidance 0.5", group="guidance", data_guidance=0.5),
    replace(DEFAULT, name="data guidance 0.5, 10 steps", group="guidance", data_guidance=0.5, steps=10),
    replace(CLOSED, name="no chain, no network", group="chain", chain="none"),
    replace(DEFAULT, name="no chain", group="chain", chain="none"),
    replace(CLOSED, name="guessed from all other taps, no network", group="chain", chain="others"),
    replace(CLOSED, name="errors not divided, no network", group="chain", divided=False),
    replace(CLOSED, name="covariance of the label, no network", group="chain", by_label=True),
    replace(DEFAULT, name="half as wide", group="learned part", units=64),
    replace(DEFAULT, name="twice as wide", group="learned part", units=256),
    replace(DEFAULT, name="strangest hundredth not learned from", group="learned from", strangest=0.01),
    replace(DEFAULT, name="strangest twentieth not learned from", group="learned from", strangest=0.05),
    replace(DEFAULT, name="level 0.3", group="levels", sigmas=(0.3,)),
    replace(DEFAULT, name="level 1", group="levels", sigmas=(1.0,)),
    replace(DEFAULT, name="level 2", group="levels", sigmas=(2.0,)),
    replace(DEFAULT, name="levels 0.5, 1, 2", group="levels", sigmas=(0.5, 1.0, 2.0)),
    replace(DEFAULT, name="a level a tap, 0.3 to 1.6", group="levels", span=(0.3, 1.6)),
    replace(DEFAULT, name="a level a tap, 1.6 to 0.3", group="levels", span=(1.6, 0.3)),
    replace(DEFAULT, name="nearest of the samples", group="samples", distance="nearest"),
    replace(DEFAULT, name="mean distance to the samples", group="samples", distance="each"),
    replace(DEFAULT, name="2 draws", group="samples", draws=2),
    replace(DEFAULT, name="16 draws", group="samples", draws=16),
    replace(DEFAULT, name="2 steps", group="samples", steps=2),
    replace(DEFAULT, name="3 steps", group="samples", steps=3),
    replace(DEFAULT, name="10 steps", group="samples", steps=10),
    replace(DEFAULT, name="50 steps", group="samples", steps=50),
    replace(DEFAULT, name="one band a tap", group="bands and taps", edges=(0,)),
    replace(DEFAULT, name="two bands a tap", group="bands and taps", edges=(0, 16)),
    replace(DEFAULT, name="first half of the taps", group="bands and taps", taps="first half"),
    replace(DEFAULT, name="second half of the taps", group="bands and taps", taps="second half"),
    replace(DEFAULT, name="last tap alone", group="bands and taps", taps="last"),
    replace(DEFAULT, name="pooled vectors: one mean a channel", group="maps", grid=1),
    replace(CLOSED, name="pooled vectors, network off", group="maps", grid=1),
    replace(DEFAULT, name="maps of 4 x 4 means", group="maps", grid=4),
    replace(CLOSED, name="maps of 4 x 4 means, network off", group="maps", grid=4),
    replace(DEFAULT, name="all taps count alike", group="rule", deep=1.0),
    replace(DEFAULT, name="root mean square of all pieces", group="rule", rule="squares"),
    replace(DEFAULT, name="mean of all pieces", group="rule", rule="pieces"),
    replace(DEFAULT, name="largest -log p", group="rule", rule="max"),
    replace(DEFAULT, name="mean of standard scores", group="rule", rule="z"),
)
