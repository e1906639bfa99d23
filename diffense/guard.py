"""The guard: a bundle on disk, loaded and used without a server."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from diffense.errors import ImageError, WrongTargetError
from diffense.graphs import hash_target, open_session, read_model, run_batched
from diffense.images import Preprocessing
from diffense.manifest import Manifest, check_files, read_manifest
from diffense.names import DENOISER_FILE, GUIDE, LATENTS, MANIFEST_FILE, NOISED, SAMPLE, SIGMA, TAPPED_FILE
from diffense.rule import name_groups, share_score
from diffense.sampling import Denoise
from diffense.scorer import Scored, Scorer
from diffense.surprise import find_surprise

BLOCK: Final = 256  # images scored at once, so that memory does not grow with the list


class Verdicts(NamedTuple):
    """Verdicts on N images: scores float32, p_values float64, flagged uint8 (1 = flagged), each (N,)."""

    scores: NDArray[np.float32]
    p_values: NDArray[np.float64]
    flagged: NDArray[np.uint8]


class Finding(NamedTuple):
    """One piece of evidence about one image; surprise = -log p on clean images; band as in `scoring.Evidence`.

    The distance is as measured; a mismatch is told less what doubt excuses of it, 1 being usual where there is none.
    """

    kind: str
    tap: str
    band: int
    level: int
    distance: float
    surprise: float


@dataclass(frozen=True)
class Explanation:
    """Why an image got its score; `tap` is the one whose findings add most to it, `rows` are the most surprising first."""

    score: float
    p_value: float
    flagged: bool
    label: int
    tap: str
    rows: tuple[Finding, ...]


class Guard:
    """A fitted guard.

    Attributes:
        directory: the bundle.
        manifest: what it says of itself.
        scorer: the arithmetic.
    """

    def __init__(self, directory: Path, manifest: Manifest, scorer: Scorer) -> None:
        self.directory, self.manifest, self.scorer = directory, manifest, scorer

    @classmethod
    def load(cls, directory: Path | str, target: Path | str | None = None) -> "Guard":
        """Open a bundle; nothing in it is executed, every file is checked first.

        Args:
            directory: the bundle.
            target: the classifier's ONNX file, when it shall be checked that the guard belongs to it.

        Raises:
            TamperedError: a file is missing, changed, or leads out of the folder.
            SchemaError: the manifest is newer than this version or malformed.
            WrongTargetError: the guard was fitted on another classifier.
        """
        directory = Path(directory)
        manifest = read_manifest(directory)
        check_files(directory, manifest)
        if target is not None and hash_target(Path(target)) != manifest.target_sha256:
            raise WrongTargetError(
                f"the guard in {directory} was fitted on {manifest.target_name} (SHA-256 {manifest.target_sha256[:12]}…), "
                f"{target} is another file; fit a guard for it"
            )
        return cls(directory, manifest, Scorer.load(directory))

    @property
    def guard_id(self) -> str:
        """First 16 hex digits of the manifest's SHA-256; the manifest holds the hashes of all other files."""
        return hashlib.sha256((self.directory / MANIFEST_FILE).read_bytes()).hexdigest()[:16]

    @property
    def preprocessing(self) -> Preprocessing:
        """How pixels become the target's input."""
        return self.manifest.preprocessing

    @property
    def tapped_path(self) -> Path:
        """The whole target as ONNX, with `names.LATENTS` as one more output."""
        return self.directory / TAPPED_FILE

    @property
    def denoiser_path(self) -> Path | None:
        """The denoiser as ONNX; None when the network is off."""
        return self.directory / DENOISER_FILE if self.manifest.network.used else None

    @cached_property
    def _tapped(self) -> Any:
        read_model(self.tapped_path)  # refuses weights outside the bundle, which not every onnxruntime does
        return open_session(self.tapped_path)

    @cached_property
    def denoise(self) -> Denoise | None:
        """One guided step through onnxruntime; None when the network is off."""
        if self.denoiser_path is None:
            return None
        read_model(self.denoiser_path)  # as above
        return open_denoiser(self.denoiser_path)

    def run(self, images: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Run the target: (N, H, W, C) uint8 -> (N, classes) logits and (N, W) latents, float32.

        Raises:
            ImageError: wrong dtype or shape, or the target overflows on an image.
            TargetError: a graph of the bundle names weights outside it.
        """
        wanted = [self.manifest.logits, LATENTS]
        self.preprocessing.check(images)
        logits, latents = run_batched(self._tapped, images, wanted, self.manifest.batch, prepare=self.preprocessing.apply)
        logits = logits.reshape(len(images), self.manifest.classes)
        broken = np.flatnonzero(~(np.isfinite(logits).all(axis=1) & np.isfinite(latents).all(axis=1)))
        if len(broken):
            raise ImageError(f"image {broken[0]} makes the target's features overflow; check --scale, --mean and --std")
        return logits, latents

    def score_all(self, images: NDArray[np.uint8]) -> Scored:
        """As `score`, with the predicted labels."""
        logits, latents = self.run(images)
        blocks = [slice(i, i + BLOCK) for i in range(0, max(1, len(images)), BLOCK)]
        parts = [self.scorer.score(logits[block], latents[block], self.denoise) for block in blocks]
        return Scored(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def score(self, images: NDArray[np.uint8]) -> Verdicts:
        """Score images.

        Args:
            images: (N, H, W, C) uint8 pixels of the size that the target takes.

        Raises:
            ImageError, TargetError: as `run`.
        """
        return Verdicts(*self.score_all(images)[:3])

    def explain(self, image: NDArray[np.uint8]) -> Explanation:
        """Say which tap and band spoke for one (H, W, C) uint8 image."""
        logits, latents = self.run(image[None])
        distances = self.scorer.measure(logits, latents, self.denoise)
        surprises = find_surprise(self.scorer.rule.pieces, distances, np)[0]
        scores = self.scorer.weigh(distances)
        p_values, flagged = self.scorer.judge(scores)
        taps = [tap.name for tap in self.manifest.taps]
        rows = [
            Finding(e.kind, taps[e.tap], e.band, e.level, float(np.exp(distance)), float(surprise))
            for e, distance, surprise in zip(self.scorer.evidence, distances[0], surprises, strict=True)
        ]
        shares = share_score(self.scorer.rule, surprises[None], np)[0]
        loudness = dict.fromkeys(taps, 0.0)
        for (_, tap), share in zip(name_groups(self.scorer.evidence), shares, strict=True):
            loudness[taps[tap]] += float(share)
        return Explanation(
            float(scores[0]),
            float(p_values[0]),
            bool(flagged[0]),
            int(logits[0].argmax()),
            max(loudness, key=lambda tap: loudness[tap]),
            tuple(sorted(rows, key=lambda row: -row.surprise)),
        )


def open_denoiser(graph: Path | ir.Model) -> Denoise:
    """Open a denoiser graph as a function of (noised, sigma, guide), all float32."""
    session = open_session(graph)

    def step(noised: Any, sigma: Any, guide: Any) -> Any:
        return session.run([SAMPLE], {NOISED: noised, SIGMA: sigma, GUIDE: guide})[0]

    return step
