"""What the guard and its peers cost beyond the prediction itself, in forward passes and in time, on one machine in one run.

usage: python -m benchmarks.serving.peers_cost [--dataset cifar10] [--attack wanet] [--peers strip,ibdpsc]

Writes benchmarks/results/peers_cost.json. The guard runs in onnxruntime, the peers on the torch network, so each is divided
by one prediction of its own runtime, timed in turns with it.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from benchmarks.evaluation import Evaluated, fit_cell, prepare_cell
from benchmarks.inspection import inspect_images, score_inspected, split_defender, take
from benchmarks.peers import make_peer
from benchmarks.peers.base import Inspected, Model
from benchmarks.records import PEERS_COST, Row, read_rows, write_row
from benchmarks.settings import describe_machine, find_commit
from benchmarks.targets import make_cell
from diffense.errors import DiffenseError
from diffense.graphs import open_session
from diffense.guard import Guard

PEERS: Final = "strip,ibdpsc,scaleup,ted,tedpp,teco,latent_all_doubt,meandist,mahalanobis,probe,knn"
BATCH: Final = 8
BATCHES: Final = 4
ROUNDS: Final = 3

Run = Callable[[Inspected], Any]


def main(arguments: Sequence[str]) -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--attack", default="wanet")
    parser.add_argument("--peers", default=PEERS)
    options = parser.parse_args(arguments)
    try:
        cell = make_cell(options.dataset, options.attack)
        found = prepare_cell(cell, None, print)
        guard = fit_cell(found, None, 0, print)
        for name in ("guard", *options.peers.split(",")):
            row = measure_guard(found, guard) if name == "guard" else measure_peer(found, guard, name)
            facts = {"peer": name, "dataset": cell.dataset, "attack": cell.attack, "batch": BATCH}
            write_row(row | facts | {"machine": describe_machine(), "commit": find_commit()}, PEERS_COST)
            print(f"{name} is measured", file=sys.stderr, flush=True)
        print("\n".join(render_table(read_rows(PEERS_COST))))
    except DiffenseError as error:
        sys.exit(f"peers_cost: {error}")


def measure_guard(found: Evaluated, guard: Guard) -> Row:
    """The guard in the shared placement: tapped graph and scoring, less the production graph."""
    production = open_session(found.target.path)
    node = production.get_inputs()[0].name
    views = cut_batches(inspect_images(guard, found.evaluation.pixels[: BATCH * BATCHES]))

    def predict(view: Inspected) -> None:
        production.run(None, {node: guard.preprocessing.apply(view.images)})

    def judge(view: Inspected) -> None:
        score_inspected(guard, inspect_images(guard, view.images))

    plain, guarded = time_in_turns(predict, judge, views)
    return {"forwards": 0.0, "ms": guarded - plain, "forward_ms": plain}


def measure_peer(found: Evaluated, guard: Guard, name: str) -> Row:
    """A rival, given the prediction and the guard's latents; its own passes are what counts."""
    defender = inspect_images(guard, found.clean.pixels)
    rows, _ = split_defender(guard, defender, found.clean)
    peer, model = make_peer(name), Model(found.target.network, found.target.cell.spec.classes)
    peer.fit(model, take(defender, rows), found.clean.labels[rows])
    views = cut_batches(inspect_images(guard, found.evaluation.pixels[: BATCH * BATCHES]))
    before = model.forwards
    peer.score(model, views[0])
    forwards = (model.forwards - before) / BATCH
    plain, more = time_in_turns(lambda view: model.predict(view.images), lambda view: peer.score(model, view), views)
    return {"forwards": forwards, "ms": more, "forward_ms": plain}


def cut_batches(view: Inspected) -> list[Inspected]:
    """Batches as a server would get them."""
    return [take(view, np.arange(i, i + BATCH)) for i in range(0, BATCH * BATCHES, BATCH)]


def time_in_turns(first: Run, second: Run, views: Sequence[Inspected]) -> tuple[float, float]:
    """Median milliseconds an image of two ways, batch by batch in turns; one batch warms up."""
    times: list[list[float]] = [[], []]
    for view in (views[0], *list(views) * ROUNDS):
        for kept, run in zip(times, (first, second), strict=True):
            start = time.perf_counter()
            run(view)
            kept.append((time.perf_counter() - start) / BATCH * 1e3)
    plain, other = (float(np.median(kept[1:])) for kept in times)
    return plain, other


def render_table(rows: Sequence[Row]) -> list[str]:
    """Markdown, cheapest first."""
    lines = ["| cell | detector | further forward passes | ms more an image | one prediction, ms | more, in predictions |"]
    lines += ["| --- | --- | --- | --- | --- | --- |"]
    for row in sorted(rows, key=lambda r: r["ms"] / r["forward_ms"]):
        cells = [f"{row['dataset']} {row['attack']}", row["peer"], f"{row['forwards']:.1f}"]
        cells += [f"{row['ms']:.3g}", f"{row['forward_ms']:.3g}", f"{row['ms'] / row['forward_ms']:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    main(sys.argv[1:])
