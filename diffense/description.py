"""What `diffense inspect` shows of a guard or a classifier, as data."""

from pathlib import Path

from pydantic import BaseModel

from diffense.guard import Guard
from diffense.manifest import Manifest
from diffense.target import Layout, Target


class TapLine(BaseModel):
    """A tap: tensor, kind, shape without the batch, depth in 0..1, and whether a guard would read (or reads) it."""

    name: str
    kind: str
    shape: tuple[int, ...]
    depth: float
    used: bool


class TargetDescription(BaseModel):
    """A classifier, as Diffense understands it."""

    file: str
    sha256: str
    input: str
    layout: str
    size: tuple[int, int]
    batch: int | None
    outputs: list[str]
    logits: str
    classes: int
    probabilities: bool
    opset: int
    taps: list[TapLine]

    def facts(self) -> dict[str, str]:
        """Name -> text of everything but the taps."""
        return {
            "classifier": self.file,
            "SHA-256": self.sha256,
            "input": f"{self.input}, {self.layout}, {self.size[0]}x{self.size[1]}",
            "batch": "any" if self.batch is None else str(self.batch),
            "outputs": ", ".join(self.outputs),
            "logits": f"{self.logits}, {self.classes} classes{', softmaxed' if self.probabilities else ''}",
            "opset": str(self.opset),
        }


class GuardDescription(BaseModel):
    """A guard: its id, its manifest, its taps."""

    guard_id: str
    manifest: Manifest
    taps: list[TapLine]

    def facts(self) -> dict[str, str]:
        """Name -> text of what a user asks first."""
        m = self.manifest
        low, high = m.false_alarm_interval
        same = "" if m.clean.calibrated_groups is None else f" of {m.clean.calibrated_groups} groups"
        same += ", the same ones by folds" if m.crossed else ""
        learned = f"; {m.network.left_out} images and copies not learned from" if m.network.left_out is not None else ""
        sigmas = ", ".join(str(row[0]) if len(set(row)) == 1 else str(list(row)) for row in m.sampling.sigmas)
        return {
            "guard": self.guard_id,
            "of": f"{m.target_name} (SHA-256 {m.target_sha256[:16]}…)",
            "alpha": f"{m.alpha:g}, realised between {low:.2%} and {high:.2%} (90 % interval)",
            "clean images": f"{m.clean.fitted} fitted (+ {m.clean.copies} copies), {m.calibration_size} calibrate{same}",
            "guided by": m.clean.guide,
            "network": f"{'on' if m.network.used else 'off'}: {m.network.reason}{learned}",
            "sampling": f"sigma {sigmas}; {m.sampling.steps} steps, {m.sampling.draws} draws",
            "shared placement": "logits bit-identical" if m.shared_exact else f"logits differ by {m.shared_max_difference:.1e}",
            "files": ", ".join(m.files),
        }


def describe_target(
    path: Path, logits: str | None = None, size: tuple[int, int] | None = None, layout: Layout | None = None
) -> TargetDescription:
    """Open a classifier and list what can be tapped.

    Raises:
        TargetError: the file is no image classifier that can be guarded.
    """
    target = Target.open(path, logits=logits, size=size, layout=layout)
    chosen = {tap.name for tap in target.choose_taps()}
    return TargetDescription(
        file=target.path.name,
        sha256=target.sha256,
        input=f"{target.input.name} {target.input.dtype}",
        layout=target.layout,
        size=target.size,
        batch=target.batch,
        outputs=[output.name for output in target.outputs],
        logits=target.logits,
        classes=target.classes,
        probabilities=target.probabilities,
        opset=target.opset,
        taps=[
            TapLine(name=tap.name, kind=tap.kind, shape=tap.shape, depth=round(tap.depth, 4), used=tap.name in chosen)
            for tap in target.list_taps()
        ],
    )


def describe_guard(directory: Path) -> GuardDescription:
    """Open a guard and show its manifest.

    Raises:
        BundleError: the guard cannot be loaded.
    """
    guard = Guard.load(directory)
    taps = [TapLine(name=t.name, kind=t.kind, shape=t.shape, depth=t.depth, used=True) for t in guard.manifest.taps]
    return GuardDescription(guard_id=guard.guard_id, manifest=guard.manifest, taps=taps)
