"""The demonstration from digits to figures: train, guard, export, serve, attack, report."""

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from diffense.clean import count_calibration
from diffense.demo.account import Setup, Victim, compute_figures, describe_attack, describe_run, write_summary
from diffense.demo.attacks import TARGET_LABEL, Attack, BadNets, WaNet
from diffense.demo.digits import SIDE, Digits, load_split
from diffense.demo.serving import Channel, ask_server, time_requests
from diffense.demo.stages import Stages, Update
from diffense.demo.training import INPUT, save_onnx, train_classifier
from diffense.errors import OptionError
from diffense.fit import fit_guard
from diffense.names import VERDICT_TENSORS
from diffense.report import Figures, write_report
from diffense.serve import Endpoints, TritonServer
from diffense.settings import FitSettings
from diffense.target import Target
from diffense_export.configs import read_family
from diffense_export.repository import export_guard

ATTACKS: Final[dict[str, Callable[[int], Attack]]] = {
    "badnets": lambda seed: BadNets(),
    "wanet": lambda seed: WaNet((SIDE, SIDE), seed=seed),
}
PLACEMENT: Final[Literal["separate", "shared"]] = "separate"
LOOP: Final[Literal["bls", "fused"]] = "bls"
MODEL_PREFIX: Final = "digits_"
SAMPLES: Final = 20  # images of each kind that are left as files
REPORT_FILE: Final = "report.html"
SUMMARY_FILE: Final = "summary.json"
REQUEST_FILE: Final = "request.json"


@dataclass(frozen=True)
class DemoOptions:
    """What `diffense demo` is asked for.

    Attributes:
        out: folder for everything that the demonstration leaves.
        seed: of split, attacks, training and guard.
        alpha: false-alarm rate that is asked for.
        attacks: keys of `ATTACKS`.
    """

    out: Path
    seed: int = 0
    alpha: float = 0.01
    attacks: tuple[str, ...] = tuple(ATTACKS)


@dataclass(frozen=True)
class Demo:
    """A finished demonstration, whose server still runs.

    Attributes:
        figures: one row an attack.
        victims: the classifiers and their guards.
        endpoints: where the server answers.
        server: the server itself.
    """

    figures: tuple[Figures, ...]
    victims: tuple[Victim, ...]
    endpoints: Endpoints
    server: TritonServer


@contextmanager
def run_demo(options: DemoOptions, stages: Stages) -> Iterator[Demo]:
    """Run the demonstration; the server runs until the context ends.

    Raises:
        OptionError: an attack that does not exist, or none, an alpha that is none, a folder that cannot be written to or holds
            somebody else's models, or a package is missing.
        TooFewImagesError: an alpha that the digits are too few for.
        ServeError: the server cannot be started.
        ClientError: an answer is missing, or gRPC and HTTP do not agree.
    """
    attacks = choose_attacks(options)
    out, split = options.out, load_split(options.seed)
    count_calibration(len(split.clean), options.alpha)  # refuses an alpha now, and not after the training
    _open_folder(out)
    repository = out / "repository"
    check_repository(repository, [attack.key for attack in attacks])
    paths = {attack.key: out / f"{MODEL_PREFIX}{attack.key}.onnx" for attack in attacks}
    with stages.stage(f"training {len(attacks)} backdoored classifiers") as update:
        train_all(split.train, attacks, paths, options.seed, update)
    victims = tuple(
        _guard_classifier(attack, paths[attack.key], split.clean, split.evaluation, options, stages) for attack in attacks
    )
    with stages.stage("exporting to a Triton repository"):
        clear_repository(repository)
        for victim in victims:
            clean = split.clean.pixels
            export_guard(victim.guard, victim.path, repository, victim.model, placement=PLACEMENT, loop=LOOP, clean=clean)
    _leave_samples(out, victims, split.evaluation)
    server = TritonServer(repository, log=out / "triton.log")
    with stages.stage("starting Triton"):
        server.start()
    try:
        yield _measure(server, victims, split.evaluation, options, stages)
    finally:
        server.stop()


def choose_attacks(options: DemoOptions) -> list[Attack]:
    """Build the attacks that are asked for.

    Raises:
        OptionError: one that does not exist, or none.
    """
    unknown = [key for key in options.attacks if key not in ATTACKS]
    if unknown or not options.attacks:
        wrong = repr(unknown[0]) if unknown else "no attack"
        raise OptionError(f"--attacks names {wrong}; choose from {', '.join(ATTACKS)}, separated by commas")
    return [ATTACKS[key](options.seed) for key in dict.fromkeys(options.attacks)]


def train_all(train: Digits, attacks: list[Attack], paths: dict[str, Path], seed: int, update: Update) -> None:
    """Train a classifier for each attack and write them as ONNX files; one thread each, at the same time.

    Two trainings side by side use two cores better than two threads share one small training.
    """
    shares = dict.fromkeys(paths, 0.0)
    lock = threading.Lock()

    def train_one(attack: Attack) -> None:
        def note(share: float) -> None:
            with lock:
                shares[attack.key] = share
                update(sum(shares.values()) / len(shares))

        save_onnx(train_classifier(train, attack, seed, note), paths[attack.key])

    with limit_threads(), ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(train_one, attacks))


@contextmanager
def limit_threads() -> Iterator[None]:
    """Give torch one thread: its threads spin while they wait, which costs networks this small more than it gains."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def check_repository(repository: Path, keys: Sequence[str]) -> None:
    """Find out before the training whether the export will be refused.

    Raises:
        OptionError: a folder where these attacks' models go is somebody else's.
    """
    for family in (f"{MODEL_PREFIX}{key}" for key in keys):
        for place in [*repository.glob(family), *sorted(repository.glob(f"{family}_*"))]:
            if read_family(place) != family:
                raise OptionError(f"{place} exists and was not written by a demonstration; choose another --out")


def clear_repository(repository: Path) -> None:
    """Take away the models that earlier demonstrations exported, and nobody else's of such a name."""
    families = {f"{MODEL_PREFIX}{key}" for key in ATTACKS}
    for old in repository.glob(f"{MODEL_PREFIX}*"):
        if read_family(old) in families:
            shutil.rmtree(old)


def _open_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(f"--out is {out}, where no folder can be made ({error.strerror}); choose another") from None
    if not os.access(out, os.W_OK):
        raise OptionError(f"--out is {out}, a folder that you may not write to; choose another")


def _guard_classifier(
    attack: Attack, path: Path, clean: Digits, evaluation: Digits, options: DemoOptions, stages: Stages
) -> Victim:
    model = f"{MODEL_PREFIX}{attack.key}"
    messages: list[str] = []
    with stages.stage(f"fitting a guard against {attack.title}") as update, limit_threads():
        guard = fit_guard(
            Target.open(path),
            clean.pixels,
            options.out / "guards" / model,
            settings=FitSettings(alpha=options.alpha, seed=options.seed),
            notify=messages.append,
            report=lambda step, steps: update(step / steps),
        )
    for message in messages:
        stages.say(f"  {message}")
    moved = evaluation.labels != TARGET_LABEL
    originals = Digits(evaluation.pixels[moved], evaluation.labels[moved])
    return Victim(attack, model, path, guard, originals, attack.trigger(originals.pixels))


def _measure(
    server: TritonServer, victims: tuple[Victim, ...], evaluation: Digits, options: DemoOptions, stages: Stages
) -> Demo:
    with Channel(server.endpoints.grpc) as channel:
        setup = Setup(options.alpha, PLACEMENT, LOOP, channel.read_version())
    sections = []
    for victim in victims:
        preprocessing = victim.guard.preprocessing
        with stages.stage(f"asking the server: {victim.attack.title}"):
            clean = ask_server(server.endpoints, victim.model, evaluation.pixels, preprocessing)
            triggered = ask_server(server.endpoints, victim.model, victim.triggered, preprocessing)
        with stages.stage(f"timing requests: {victim.attack.title}"):
            latency = time_requests(server.endpoints.grpc, victim.model, evaluation.pixels, preprocessing)
        figures = compute_figures(victim.attack.title, evaluation.labels, clean, triggered, latency, setup)
        sections.append(describe_attack(victim, evaluation, clean, triggered, figures))
    with stages.stage("writing the report"):
        rows = tuple(section.figures for section in sections)
        write_summary(options.out / SUMMARY_FILE, rows)
        write_report(options.out / REPORT_FILE, sections, describe_run(setup, options.seed, stages.seconds))
    return Demo(rows, victims, server.endpoints, server)


def _leave_samples(out: Path, victims: tuple[Victim, ...], evaluation: Digits) -> None:
    """Leave a few images as files, and a request as JSON, for whoever wants to try the server."""
    _save_images(out / "images" / "clean", evaluation.pixels, evaluation.labels)
    for victim in victims:
        _save_images(out / "images" / victim.attack.key, victim.triggered, victim.originals.labels)
    image = victims[0].guard.preprocessing.apply(victims[0].triggered[:1])
    entry = {"name": INPUT, "shape": image.shape, "datatype": "FP32", "data": image.ravel().round(6).tolist()}
    request = {"inputs": [entry], "outputs": [{"name": name} for name in VERDICT_TENSORS]}
    (out / REQUEST_FILE).write_text(json.dumps(request) + "\n", encoding="utf-8")


def _save_images(folder: Path, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(min(SAMPLES, len(images))):
        Image.fromarray(images[index, :, :, 0]).save(folder / f"{index:02d}_is_{labels[index]}.png")
